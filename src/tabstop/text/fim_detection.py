"""Which family a checkpoint's vocabulary belongs to, and the ids of its markers there.

Markers decide; where families share markers, other tokens do, then the architecture, and the checkpoint's name last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tabstop.checkpoint import Checkpoint
from tabstop.errors import ConfigError
from tabstop.text.fim_families import BY_NAME, FAMILIES, Family
from tabstop.text.tokenizer import Tokenizer

GGUF_KEYS = {
    "prefix": ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id"),
    "suffix": ("tokenizer.ggml.fim_suf_token_id", "tokenizer.ggml.suffix_token_id"),
    "middle": ("tokenizer.ggml.fim_mid_token_id", "tokenizer.ggml.middle_token_id"),
}
"""Part → metadata that names its token, newest first."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a choice between families with equal markers may look at."""

    has: Callable[[str], bool]  # whether the vocabulary has a token
    model_type: str
    name: str  # lower case
    config: Mapping[str, Any]


def _pick_pipes(known: Known) -> str:
    if known.has("<|file_separator|>"):
        return "codegemma"
    if known.has("<|repo_name|>"):
        return "qwen"
    return "granite" if known.has("<|end_of_text|>") else "pipes"


def _pick_plain(known: Known) -> str:
    """Mellum and the small Granite models are both Llamas with BigCode's tokens; Granite's layers have biases."""
    if "granite" in known.name:
        return "granite-code"
    if known.model_type == "stablelm" or "stable" in known.name:
        return "stablecode"
    if known.model_type == "starcoder2":
        return "starcoder2"
    if "mellum" in known.model_type or "mellum" in known.name:
        return "mellum"
    if known.model_type == "llama" and known.has("<filename>"):
        biased = known.config.get("attention_bias") or known.config.get("mlp_bias")
        return "granite-code" if biased else "mellum"
    return "starcoder2" if known.has("<file_sep>") and known.model_type != "gpt_bigcode" else "starcoder"


def _pick_code(known: Known) -> str:
    return "codegeex" if known.model_type == "chatglm" or "codegeex" in known.name else "glm"


PICKS: dict[str, Callable[[Known], str]] = {
    "<|fim_prefix|>": _pick_pipes,
    "<fim_prefix>": _pick_plain,
    "<|code_prefix|>": _pick_code,
}
"""Prefix markers that several families share → who of them it is."""


def detect(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Family | None:
    """The family of a checkpoint; None when its vocabulary has no markers."""
    config = checkpoint.config
    known = Known(
        lambda token: tokenizer.token_id(token) is not None,
        str(config.get("model_type", "")),
        checkpoint.name.lower(),
        config,
    )
    for family in FAMILIES:
        if all(known.has(marker) for marker in (family.prefix, family.suffix, family.middle) if marker):
            pick = PICKS.get(family.prefix)
            return BY_NAME[pick(known)] if pick else family
    return _without_blanks(known) or _from_metadata(checkpoint, tokenizer)


def choose(checkpoint: Checkpoint, tokenizer: Tokenizer, asked: str = "auto") -> Family | None:
    """As `detect`, or the family that an operator asked for by name ("off": none). Raises ConfigError."""
    if asked == "auto":
        return detect(checkpoint, tokenizer)
    if asked == "off":
        return None
    family = BY_NAME.get(asked)
    if family is None:
        raise ConfigError(f"--fim is {asked!r}; choose auto, off or one of {', '.join(BY_NAME)}")
    missing = [m for m in (family.prefix, family.suffix, family.middle) if m and tokenizer.token_id(m) is None]
    if missing:
        raise ConfigError(f"--fim {asked} needs tokens that this vocabulary lacks: {', '.join(missing)}; leave it out")
    return family


def _without_blanks(known: Known) -> Family | None:
    """CodeLlama's markers as some conversions spell them."""
    family = BY_NAME["codellama"]
    bare = [marker.removeprefix("▁") for marker in (family.prefix, family.suffix, family.middle)]
    if not all(map(known.has, bare)):
        return None
    return replace(family, prefix=bare[0], suffix=bare[1], middle=bare[2], stops=(*family.stops, "<EOT>"))


def _from_metadata(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Family | None:
    """Markers of no known spelling that a GGUF file names."""
    metadata = checkpoint.gguf_metadata
    spelled: dict[str, str] = {}
    by_id = {token_id: token for token, token_id in tokenizer.control_tokens.items()}
    for part, keys in GGUF_KEYS.items():
        token_id = next((metadata[key] for key in keys if key in metadata), None)
        if token_id not in by_id:
            return None
        spelled[part] = by_id[token_id]
    return Family("gguf", spelled["prefix"], spelled["suffix"], spelled["middle"])


def stop_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Every token of the vocabulary that ends the text of a hole in some family."""
    bare = ("<EOT>", "<PRE>", "<SUF>", "<MID>")
    names = {name for family in FAMILIES for name in family.stop_tokens} | set(bare)
    found = (tokenizer.token_id(name) for name in names)
    return frozenset(token_id for token_id in found if token_id is not None)
