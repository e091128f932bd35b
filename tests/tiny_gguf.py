"""Tiny checkpoints as GGUF files, written with the gguf package, beside the float weights that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.tiny import CHATML_TEMPLATE, IM_END, IM_START, SPECIAL_TOKENS, random_weights, tokenizer_json

FILE_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SCALE_OFFSETS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 scales lie in the blocks that the gguf package can read but not write."""


@dataclass(frozen=True)
class TinyGGUF:
    path: Path
    weights: dict[str, torch.Tensor]  # the Hub's names and order of rows: what a reader must get


def file_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight → blk.0.attn_q.weight"""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{FILE_NAMES[part]}.{kind}"
    return f"{FILE_NAMES[stem]}.{kind}"


def to_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The Hub's order of q and k rows → rotary pairs next to each other, as the llama architecture's converters do."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def from_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def random_blocks(shape: tuple[int, ...], encoding: str, rng: np.random.Generator) -> np.ndarray:
    """Random bytes with small scales, for encodings that the gguf package cannot write."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding]]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // values, size), dtype=np.uint8)
    for offset in SCALE_OFFSETS[encoding]:
        scales = rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def write_gguf(path: Path, config: dict[str, Any], encoding: str = "F32", **metadata: Any) -> TinyGGUF:
    """Random weights in one encoding (vectors stay F32); `metadata` adds keys, replaces them, or drops them (None)."""
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**file_metadata(config), **metadata}.items():
        add_value(writer, key, value)
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
    rng, weights = np.random.default_rng(0), {}
    for name, tensor in random_weights(config).items():
        num_heads = next((count for part, count in heads.items() if part in name and architecture == "llama"), None)
        array = tensor.numpy() if num_heads is None else to_pairs(tensor.numpy(), num_heads)
        kind = gguf.GGMLQuantizationType[encoding if array.ndim == 2 else "F32"]
        if kind.name in SCALE_OFFSETS:
            raw = random_blocks(array.shape, encoding, rng)
        else:
            raw = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(file_name(name), raw, raw_dtype=kind)
        decoded = gguf.quants.dequantize(raw, kind)
        weights[name] = torch.from_numpy(decoded if num_heads is None else from_pairs(decoded, num_heads)).contiguous()
    if "rope_divisors" in config:
        writer.add_tensor("rope_freqs.weight", np.array(config["rope_divisors"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyGGUF(path, weights)


def file_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The model's and the tokenizer's keys."""
    name, tokenizer = config["model_type"], tokenizer_json()
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    tokens += [f"[unused{index}]" for index in range(len(tokens), config["vocab_size"])]
    model = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if config.get("head_dim"):
        model |= {f"attention.{kind}_length": config["head_dim"] for kind in ("key", "value")}
        model["rope.dimension_count"] = config["head_dim"]
    return {f"{name}.{key}": value for key, value in model.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": tokenizer["model"]["merges"],
        "tokenizer.ggml.bos_token_id": IM_START,
        "tokenizer.ggml.eos_token_id": IM_END,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML_TEMPLATE,
    }


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds a key in the file format's type for a Python value."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        kinds[type(value)](key, value)
