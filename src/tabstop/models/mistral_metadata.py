"""Translates Mistral's own form (params.json, consolidated*.safetensors) into the Hub's terms. Knows no torch.

Devstral, Codestral and their like come in this form, some in no other. Values that would change the mathematics and are
not known here are refused by their name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabstop.errors import UnsupportedModelError
from tabstop.models.gguf_header import shown

PARAMS = "params.json"
WEIGHTS = "consolidated"

CONFIG_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "sliding_window": "sliding_window",
}
YARN_KEYS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta": "beta_fast",
    "alpha": "beta_slow",
}
HARMLESS = frozenset(("model_type", "causal", "dtype", "torch_dtype", "rope_scaling", "vision_encoder", "multimodal"))
"""Keys that say nothing of the text model, or nothing new."""

USUAL_CONTEXT = 32768
"""Tokens, where the file does not say: Codestral's."""

TENSOR_NAMES = {
    r"tok_embeddings\.(.+)": r"model.embed_tokens.\1",
    r"norm\.(.+)": r"model.norm.\1",
    r"output\.(.+)": r"lm_head.\1",
    r"layers\.(\d+)\.attention_norm\.(.+)": r"model.layers.\1.input_layernorm.\2",
    r"layers\.(\d+)\.ffn_norm\.(.+)": r"model.layers.\1.post_attention_layernorm.\2",
    r"layers\.(\d+)\.attention\.w([qkvo])\.(.+)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"layers\.(\d+)\.feed_forward\.w1\.(.+)": r"model.layers.\1.mlp.gate_proj.\2",
    r"layers\.(\d+)\.feed_forward\.w2\.(.+)": r"model.layers.\1.mlp.down_proj.\2",
    r"layers\.(\d+)\.feed_forward\.w3\.(.+)": r"model.layers.\1.mlp.up_proj.\2",
}
"""Name → the Hub's, as regular expressions."""

IMAGES = re.compile(r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..+")
"""Tensors that read images, which are not served."""


def is_own_form(folder: Path) -> bool:
    """Whether a folder has this form, and not the Hub's: repositories often hold both."""
    if not (folder / PARAMS).is_file():
        return False
    return not (folder / "config.json").is_file() or (
        any(folder.glob(f"{WEIGHTS}*.safetensors")) and not any(folder.glob("model*.safetensors"))
    )


def hub_config(params: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """config.json's equivalent. Raises UnsupportedModelError for a key that is not known and not empty."""
    known = {*CONFIG_KEYS, *HARMLESS, "yarn", "llama_4_scaling"}
    for key, value in params.items():
        if key not in known and value not in (None, False, {}, []):
            raise UnsupportedModelError(f"{origin}: {key} is {shown(value)}; this part of Mistral's form is not known")
    config = {hub_key: params[key] for key, hub_key in CONFIG_KEYS.items() if params.get(key) is not None}
    scaling = _yarn(params.get("yarn"))
    beta = (params.get("llama_4_scaling") or {}).get("beta")
    if beta is not None:
        context = params["llama_4_scaling"].get("original_max_position_embeddings")
        scaling = {"original_max_position_embeddings": context} | (scaling or {}) | {"llama_4_scaling_beta": beta}
    return {
        "architectures": ["MistralForCausalLM" if beta is None else "Ministral3ForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "sliding_window": None,
        "max_position_embeddings": USUAL_CONTEXT,
        "rope_scaling": scaling,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }


def _yarn(yarn: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not yarn:
        return None
    scaling: dict[str, Any] = {hub_key: yarn[key] for key, hub_key in YARN_KEYS.items() if key in yarn}
    if not yarn.get("apply_scale"):
        scaling["attention_factor"] = 1.0
    return {"rope_type": "yarn"} | scaling


def hub_name(name: str) -> str:
    for pattern, replacement in TENSOR_NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def hub_names(names: Iterable[str]) -> dict[str, str]:
    """The Hub's name → the file's, without those of images."""
    return {hub_name(name): name for name in names if not IMAGES.fullmatch(name)}
