"""A checkpoint that transformers saved → the GGUF file that a converter would make of it.

Names come from the gguf package's own maps; what converters do beside renaming is written down once more here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny_gguf import add_value, from_pairs, to_pairs


@dataclass(frozen=True)
class Form:
    """How one family is written."""

    architecture: str  # general.architecture
    metadata: dict[str, Any] = field(default_factory=dict)  # beside the sizes
    has_pairs: bool = False
    has_packed_heads: bool = False  # head by head in the checkpoint, stacked in the file
    norm_offset: float = 0.0
    stacks_qkv: bool = False  # q, k and v of the checkpoint are one tensor of the file


def file_name(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def write_family(folder: Path, form: Form, encoding: str = "F32") -> Path:
    """Writes <folder>/model.gguf; the folder's own weights become what the file's values decode to."""
    config = json.loads((folder / "config.json").read_text())
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == form.architecture)
    names = gguf.get_tensor_name_map(architecture, 2)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, form.architecture)
    for key, value in metadata_of(config, form).items():
        add_value(writer, key, value)
    decoded = {}
    stacked: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_file(folder / "model.safetensors").items():
        kind = gguf.GGMLQuantizationType[encoding if array.ndim == 2 else "F32"]
        raw = gguf.quants.quantize(np.ascontiguousarray(to_file(name, array, config, form)), kind)
        decoded[name] = from_file(name, gguf.quants.dequantize(raw, kind), config, form)
        letter = name.partition(".self_attn.")[2][:1]
        if form.stacks_qkv and "_proj" in name and letter in ("q", "k", "v"):
            stacked.setdefault(name.replace(f".{letter}_proj", ".{}_proj"), {})[letter] = raw
            continue
        writer.add_tensor(file_name(names, name), raw, raw_dtype=kind)
    for name, parts in stacked.items():
        whole = np.concatenate([parts[letter] for letter in "qkv"])
        kind = gguf.GGMLQuantizationType[encoding if whole.ndim == 2 else "F32"]
        writer.add_tensor(file_name(names, name.format("q")).replace("attn_q", "attn_qkv"), whole, raw_dtype=kind)
    add_rope_factors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({name: np.ascontiguousarray(array) for name, array in decoded.items()}, folder / "model.safetensors")
    return path


def add_rope_factors(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    for kind in ("long", "short"):
        if f"{kind}_factor" in rope:
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))


def heads_of(config: dict[str, Any]) -> tuple[int, int]:
    num_heads = config.get("num_attention_heads") or config["n_head"]
    return num_heads, config.get("num_key_value_heads") or num_heads


def to_file(name: str, array: np.ndarray, config: dict[str, Any], form: Form) -> np.ndarray:
    num_heads, num_kv_heads = heads_of(config)
    if form.has_pairs and (".q_proj." in name or ".k_proj." in name):
        return to_pairs(array, num_heads if ".q_proj." in name else num_kv_heads)
    if form.has_packed_heads and ".query_key_value." in name:
        return array.reshape(num_heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    return array + form.norm_offset if name.endswith("norm.weight") else array


def from_file(name: str, array: np.ndarray, config: dict[str, Any], form: Form) -> np.ndarray:
    num_heads, num_kv_heads = heads_of(config)
    if form.has_pairs and (".q_proj." in name or ".k_proj." in name):
        return from_pairs(array, num_heads if ".q_proj." in name else num_kv_heads)
    if form.has_packed_heads and ".query_key_value." in name:
        return array.reshape(3, num_heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
    return array - form.norm_offset if name.endswith("norm.weight") else array


def metadata_of(config: dict[str, Any], form: Form) -> dict[str, Any]:
    """Sizes under the file's names, and a vocabulary that nobody reads here."""
    hidden = config.get("hidden_size") or config["n_embd"]
    num_heads, num_kv_heads = heads_of(config)
    rope = config.get("rope_parameters") or {}
    rms = config.get("rms_norm_eps")
    layer = config.get("layer_norm_eps") or config.get("norm_epsilon") or config.get("layer_norm_epsilon")
    head_dim = config.get("head_dim") or hidden // num_heads
    sizes = {
        "block_count": config.get("num_hidden_layers") or config["n_layer"],
        "context_length": config.get("max_position_embeddings") or config["n_positions"],
        "embedding_length": hidden,
        "feed_forward_length": config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        "attention.head_count": num_heads,
        "attention.head_count_kv": num_kv_heads,
        "attention.layer_norm_rms_epsilon": rms,
        "attention.layer_norm_epsilon": None if rms else layer,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else None,
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
    }
    return {f"{form.architecture}.{key}": value for key, value in (sizes | form.metadata).items()}
