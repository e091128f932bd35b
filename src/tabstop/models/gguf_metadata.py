"""Translates GGUF into the Hub's terms: config, generation_config, tokenizer_config, and the names of tensors.

Knows the names of both worlds; knows no torch and does not judge the values: models/config.py does.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import Any, NamedTuple

from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.models.gguf_families import GGUF_FAMILIES, GGUFFamily
from tabstop.models.gguf_header import GGUFHeader, GGUFTensor, shown

CONFIG_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
OPTIONAL_CONFIG_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
    "attention.sliding_window": "sliding_window",
}
SCALING_KEYS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""Below rope.scaling → rope_scaling's keys."""

SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}

END_MARKERS = frozenset(
    (
        *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|EOT|>"),
        *("<EOT>", "_<EOT>", "▁<EOT>", "[EOT]", "<end_of_turn>", "<end_of_utterance>", "<|return|>"),
        "<｜end▁of▁sentence｜>",
    )
)
"""Texts of tokens that end a turn or a text whatever the metadata says: files often name only one of them."""

BOS_BY_DEFAULT = frozenset(("llama3", "llama-v3", "llama-bpe", "falcon3"))
"""tokenizer.ggml.pre of byte-level vocabularies that start with BOS when the file does not say."""


def family_of(header: GGUFHeader) -> GGUFFamily:
    """Raises UnsupportedModelError for an unknown architecture."""
    name = header.metadata.get("general.architecture")
    if name not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        raise UnsupportedModelError(
            f"{header.path}: general.architecture is {shown(name)}; supported in GGUF files: {known}"
        )
    return GGUF_FAMILIES[name]


def hub_config(header: GGUFHeader) -> dict[str, Any]:
    """config.json's equivalent. Raises UnsupportedModelError for an unknown architecture, CheckpointError for a gap."""
    family, metadata, tensors = family_of(header), header.metadata, header.tensors
    name = metadata["general.architecture"]
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{header.path} holds no tensor token_embd.weight")
    required = {**CONFIG_KEYS, **family.epsilon}
    missing = [f"{name}.{key}" for key in required if f"{name}.{key}" not in metadata]
    if missing:
        raise CheckpointError(f"{header.path} lacks the metadata {', '.join(missing)}")
    keys = {**required, **OPTIONAL_CONFIG_KEYS, **family.keys}
    found = {hub_key: metadata[f"{name}.{key}"] for key, hub_key in keys.items() if f"{name}.{key}" in metadata}
    config = _one_number_each(header, found)
    biased = bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & set(tensors))
    return {
        **config,
        **family.values,
        **_positions(header, name, config),
        "architectures": [_architecture(family, config)],
        "model_type": name,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        **dict.fromkeys(("attention_bias", "use_bias", "use_qkv_bias"), biased),
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "multi_query": config.get("num_key_value_heads") == 1,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _architecture(family: GGUFFamily, config: dict[str, Any]) -> str:
    """Files of the llama architecture with a window are Mistral's."""
    has_window = family.architecture == "LlamaForCausalLM" and config["sliding_window"] is not None
    return "MistralForCausalLM" if has_window else family.architecture


def _positions(header: GGUFHeader, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Head size and rotary embedding."""
    head_dim = config.get("head_dim") or config["hidden_size"] // max(1, config["num_attention_heads"])
    rotary_dim = header.metadata.get(f"{name}.rope.dimension_count", head_dim)
    return {
        "head_dim": head_dim,
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_scaling": _rope_scaling(header, name),
        "rotary_dim": rotary_dim,
        "partial_rotary_factor": rotary_dim / head_dim if head_dim else 0.0,
    }


def _one_number_each(header: GGUFHeader, config: dict[str, Any]) -> dict[str, Any]:
    """The config with 0 for no window made None. Raises for a value that is no number: some give one per layer."""
    for key, value in config.items():
        if not isinstance(value, int | float) or isinstance(value, bool) != (key == "use_parallel_residual"):
            raise UnsupportedModelError(
                f"{header.path}: {key} is {shown(value)}; one number for all layers is supported"
            )
    return config | {"sliding_window": config.get("sliding_window") or None}


def _rope_scaling(header: GGUFHeader, name: str) -> dict[str, Any] | None:
    """The Hub's rope_scaling; GGUF's precomputed llama3 scaling becomes our own type 'divisors'."""
    if "rope_freqs.weight" in header.tensors:
        return {"rope_type": "divisors", "divisors": _read_floats(header, "rope_freqs.weight")}
    prefix = f"{name}.rope.scaling."
    given = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    scaling = {hub_key: given[key] for key, hub_key in SCALING_KEYS.items() if key in given}
    if "rope_factors_long.weight" in header.tensors:
        factors = {f"{kind}_factor": _read_floats(header, f"rope_factors_{kind}.weight") for kind in ("long", "short")}
        return {"rope_type": "longrope", **scaling, **factors}
    kind = given.get("type", "none")
    if kind == "yarn":
        _check_yarn(header, given)
        scaling.pop("attention_factor", None)
    return None if kind == "none" else {"rope_type": kind, **scaling}


def _check_yarn(header: GGUFHeader, given: dict[str, Any]) -> None:
    """Raises for what would change the mathematics: a magnitude of its own, or keys that are not known."""
    for key, value in given.items():
        if key not in {*SCALING_KEYS, "type", "finetuned"} or (key == "attn_factor" and value != 1.0):
            raise UnsupportedModelError(
                f"{header.path}: rope.scaling.{key} is {shown(value)}, which is not known of yarn"
            )


def _read_floats(header: GGUFHeader, name: str) -> list[float]:
    """A small F32 vector of the file."""
    tensor = header.tensors[name]
    if tensor.encoding.name != "F32" or len(tensor.shape) != 1:
        raise CheckpointError(f"{header.path}: {name} is {tensor.encoding.name} {tensor.shape}, not an F32 vector")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return list(struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.num_bytes)))


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Every token that ends a completion, the file's own EOS first: named ids, then known end markers by their text."""
    named = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    marked = [index for index, token in enumerate(tokens) if token in END_MARKERS]
    return list(dict.fromkeys(token_id for token_id in (*named, *marked) if token_id is not None))


def hub_generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json's equivalent: all end tokens, and the sampling defaults if the file has some."""
    config: dict[str, Any] = {"eos_token_id": end_token_ids(metadata)}
    for kind, hub_kind in (("bos", "bos"), ("padding", "pad")):
        token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if token_id is not None:
            config[f"{hub_kind}_token_id"] = token_id
    for key, hub_key in SAMPLING_KEYS.items():
        if f"general.sampling.{key}" in metadata:
            config[hub_key] = metadata[f"general.sampling.{key}"]
    return config


def hub_tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's equivalent: special tokens' texts, the chat template, and whether BOS is added."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    config: dict[str, Any] = {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in BOS_BY_DEFAULT),
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    for kind, hub_kind in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if token_id is not None and token_id < len(tokens):
            config[f"{hub_kind}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def hub_tensors(header: GGUFHeader) -> dict[str, GGUFTensor]:
    """The file's tensors under the Hub's names; what the file stacks and the Hub has apart is taken apart."""
    family = family_of(header)
    tensors: dict[str, GGUFTensor] = {}
    for name, tensor in header.tensors.items():
        hub = hub_name(name, family)
        if hub == name and (match := re.fullmatch(r"blk\.(\d+)\.attn_qkv\.(.+)", name)):
            tensors |= _apart(header, tensor, f"model.layers.{match[1]}.self_attn.{{}}_proj.{match[2]}")
        else:
            tensors[hub] = tensor
    return tensors


def _apart(header: GGUFHeader, tensor: GGUFTensor, name: str) -> dict[str, GGUFTensor]:
    """q, k and v of a tensor that stacks them; `name` has {} for the letter."""
    prefix = header.metadata["general.architecture"]
    num_heads = header.metadata.get(f"{prefix}.attention.head_count", 0)
    num_kv_heads = header.metadata.get(f"{prefix}.attention.head_count_kv", num_heads)
    num_units = num_heads + 2 * num_kv_heads
    if not num_units or tensor.shape[0] % num_units:
        raise CheckpointError(f"{header.path}: {tensor.name} has {tensor.shape[0]} rows for {num_units} heads")
    parts, first = {}, 0
    for letter, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
        num_bytes = tensor.num_bytes // num_units * count
        shape = (tensor.shape[0] // num_units * count, *tensor.shape[1:])
        parts[name.format(letter)] = replace(tensor, shape=shape, offset=tensor.offset + first, num_bytes=num_bytes)
        first += num_bytes
    return parts


def hub_name(name: str, family: GGUFFamily) -> str:
    for pattern, replacement in family.names.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


class RowOrder(NamedTuple):
    """How the file orders rows of heads: 'pairs' (rotary pairs next to each other) or 'stacked' (q, then k, then v)."""

    kind: str
    num_heads: int


def row_order(header: GGUFHeader, name: str) -> RowOrder | None:
    """The order of a tensor's rows (Hub's name) where it is not the Hub's."""
    family, prefix = family_of(header), header.metadata["general.architecture"]
    num_heads: int = header.metadata[f"{prefix}.attention.head_count"]
    if family.has_pairs and ".q_proj." in name:
        return RowOrder("pairs", num_heads)
    if family.has_pairs and ".k_proj." in name:
        return RowOrder("pairs", int(header.metadata.get(f"{prefix}.attention.head_count_kv", num_heads)))
    if family.has_stacked_heads and ".query_key_value." in name:
        return RowOrder("stacked", num_heads)
    return None


def value_offset(header: GGUFHeader, name: str) -> float:
    """What the file's values of a tensor (Hub's name) have more than the Hub's."""
    return family_of(header).norm_offset if name.endswith("norm.weight") else 0.0
