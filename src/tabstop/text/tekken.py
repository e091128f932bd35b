"""tekken.json (Mistral) → the content of a tokenizer.json. Knows that file's form; loads nothing.

Its vocabulary is byte-level with ranks: within a piece, the neighbours whose union has the lowest rank are joined. Ids
are ranks behind the special tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tabstop.errors import CheckpointError
from tabstop.text.byte_level import spelled

Json = dict[str, Any]

OLD_SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""By id, of files that list none."""

SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True}
"""tokenizer_config.json's equivalent."""


def tokenizer_json(tekken: Mapping[str, Any]) -> Json:
    """Raises CheckpointError for a file in another form."""
    try:
        config = tekken["config"]
        num_special = int(config["default_num_special_tokens"])
        num_tokens = int(config["default_vocab_size"]) - num_special
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:num_tokens]]
        special = _special_tokens(tekken.get("special_tokens"), num_special)
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"tekken.json is damaged or of an unknown form: {error!r}") from None
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = ranked_model(tokens, len(special))
    model["vocab"] |= {token: index for index, token in enumerate(special)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def _special_tokens(entries: list[Mapping[str, Any]] | None, count: int) -> list[str]:
    """By id; those that the file does not name are numbered."""
    named = {int(entry["rank"]): str(entry["token_str"]) for entry in entries or ()}
    if entries is None:
        named = dict(enumerate(OLD_SPECIAL_TOKENS))
    return [named.get(index, f"<SPECIAL_{index}>") for index in range(count)]


def ranked_model(tokens: list[bytes], first_id: int) -> Json:
    """The model of a tokenizer.json: token number n has the id first_id + n, and n is its rank."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a piece that is a token is that token
        "vocab": {spelled(token): index for index, token in enumerate(tokens, first_id)},
        "merges": merges_of(tokens),
    }


def merges_of(tokens: list[bytes]) -> list[list[str]]:
    """Ranked merges of a vocabulary in the order of ranks: every cut of every token, the lowest union first."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[list[str]] = []
    for token in tokens:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [[spelled(left), spelled(right)] for _, _, left, right in sorted(known)]
    return merges
