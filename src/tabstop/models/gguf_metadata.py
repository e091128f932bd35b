"""Translates GGUF into the Hub's terms: config, generation_config, tokenizer_config, and the names of tensors.

Knows the names of both worlds; knows no torch and does not judge the values: models/config.py does.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.models.gguf_header import GGUFHeader, GGUFTensor, shown

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""general.architecture → the Hub's architecture name."""

CONFIG_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL_CONFIG_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
    "attention.sliding_window": "sliding_window",
}
TENSOR_NAMES = {
    r"token_embd\.(.+)": r"model.embed_tokens.\1",
    r"output_norm\.(.+)": r"model.norm.\1",
    r"output\.(.+)": r"lm_head.\1",
    r"blk\.(\d+)\.attn_norm\.(.+)": r"model.layers.\1.input_layernorm.\2",
    r"blk\.(\d+)\.ffn_norm\.(.+)": r"model.layers.\1.post_attention_layernorm.\2",
    r"blk\.(\d+)\.attn_([qkv])\.(.+)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_output\.(.+)": r"model.layers.\1.self_attn.o_proj.\2",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(.+)": r"model.layers.\1.mlp.\2_proj.\3",
}
"""GGUF tensor name → the Hub's, as regular expressions; other names stay as they are."""

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


def hub_config(header: GGUFHeader) -> dict[str, Any]:
    """config.json's equivalent. Raises UnsupportedModelError for an unknown architecture, CheckpointError for a gap."""
    metadata, tensors = header.metadata, header.tensors
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{header.path}: general.architecture is {shown(name)}; supported in GGUF files: {', '.join(ARCHITECTURES)}"
        )
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{header.path} holds no tensor token_embd.weight")
    missing = [f"{name}.{key}" for key in CONFIG_KEYS if f"{name}.{key}" not in metadata]
    if missing:
        raise CheckpointError(f"{header.path} lacks the metadata {', '.join(missing)}")
    config: dict[str, Any] = {
        hub_key: metadata[f"{name}.{key}"]
        for key, hub_key in (CONFIG_KEYS | OPTIONAL_CONFIG_KEYS).items()
        if f"{name}.{key}" in metadata
    }
    _check_numbers(header, config)
    head_dim = config.setdefault("head_dim", config["hidden_size"] // max(1, config["num_attention_heads"]))
    rotary_dim = metadata.get(f"{name}.rope.dimension_count", head_dim)
    return config | {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "hidden_act": "silu",
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_scaling": _rope_scaling(header, name),
        "partial_rotary_factor": rotary_dim / head_dim if head_dim else 0.0,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _check_numbers(header: GGUFHeader, config: dict[str, Any]) -> None:
    """Raises for a value that is no number: some architectures give one per layer."""
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModelError(
                f"{header.path}: {key} is {shown(value)}; one number for all layers is supported"
            )


def _rope_scaling(header: GGUFHeader, name: str) -> dict[str, Any] | None:
    """The Hub's rope_scaling; GGUF's precomputed llama3 scaling becomes our own type 'divisors'."""
    if "rope_freqs.weight" in header.tensors:
        return {"rope_type": "divisors", "divisors": _read_floats(header, "rope_freqs.weight")}
    kind = header.metadata.get(f"{name}.rope.scaling.type", "none")
    if kind == "none":
        return None
    prefix = f"{name}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    return {"rope_type": kind} | {key: value for key, value in scaling.items() if key != "type"}


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
    """The file's tensors under the Hub's names."""
    return {hub_name(name): tensor for name, tensor in header.tensors.items()}


def hub_name(name: str) -> str:
    for pattern, replacement in TENSOR_NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def interleaved_heads(header: GGUFHeader, name: str) -> int | None:
    """Heads of a tensor (Hub's name) whose rows are stored in rotary pairs, else None.

    The llama architecture stores rows i and i + dim / 2 of each q and k head next to each other; the Hub, and all other
    architectures here, keep the halves apart.
    """
    if header.metadata["general.architecture"] != "llama":
        return None
    num_heads: int = header.metadata["llama.attention.head_count"]
    if ".q_proj." in name:
        return num_heads
    if ".k_proj." in name:
        return int(header.metadata.get("llama.attention.head_count_kv", num_heads))
    return None
