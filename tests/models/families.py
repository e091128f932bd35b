"""Tiny random checkpoints of every family, made and saved by transformers, whose files they then are."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 160

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 700.0}
YARN_ALL = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
GROWING = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 700.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
THETA = {"rope_type": "default", "rope_theta": 700.0}


@dataclass(frozen=True)
class Variant:
    """One shape of one family: transformers' config class, its tiny values, how both sides are asked."""

    name: str  # model_type: the class is AutoConfig's
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of our EngineConfig


def sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_parameters": THETA,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def gpt2_sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def partly(factor: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": THETA | {"partial_rotary_factor": factor} | more}


def longrope(num_pairs: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 700.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(num_pairs)],
        "long_factor": [2.0 + 0.5 * pair for pair in range(num_pairs)],
        "original_max_position_embeddings": 32,
    } | more


LONG_PHI = {"original_max_position_embeddings": 32}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
}

VARIANTS: dict[str, Variant] = {
    "llama-yarn": Variant("llama", sizes(rope_parameters=YARN)),
    "llama-yarn-all": Variant("llama", sizes(rope_parameters=YARN_ALL)),
    "llama-yarn-factor": Variant("llama", sizes(rope_parameters=YARN | {"attention_factor": 1.3})),
    "deepseek-coder": Variant("llama", sizes(rope_parameters=LINEAR, num_key_value_heads=4)),
    "granite-code": Variant("llama", sizes(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "qwen2-yarn": Variant("qwen2", sizes(rope_parameters=YARN)),
    "mistral": Variant("mistral", sizes(sliding_window=None)),
    "mistral-window": Variant("mistral", sizes(sliding_window=7, head_dim=12)),
    "ministral": Variant(
        "ministral", sizes(sliding_window=9, layer_types=["sliding_attention", "full_attention"], head_dim=8)
    ),
    "ministral-all": Variant("ministral", sizes(sliding_window=9, head_dim=8)),
    "ministral3": Variant("ministral3", sizes(head_dim=8, rope_parameters=GROWING)),
    "ministral3-window": Variant(
        "ministral3", sizes(head_dim=12, rope_parameters=GROWING, sliding_window=20, tie_word_embeddings=True)
    ),
    "qwen3": Variant("qwen3", sizes(head_dim=10)),
    "qwen3-tied": Variant("qwen3", sizes(head_dim=16, tie_word_embeddings=True, num_key_value_heads=1)),
    "qwen3-yarn": Variant("qwen3", sizes(head_dim=16, rope_parameters=YARN, attention_bias=True)),
    "starcoder2": Variant("starcoder2", sizes(sliding_window=11, tie_word_embeddings=True)),
    "starcoder2-untied": Variant(
        "starcoder2", sizes(sliding_window=None, tie_word_embeddings=False, use_bias=False, num_key_value_heads=1)
    ),
    "gpt-bigcode": Variant("gpt_bigcode", gpt2_sizes()),
    "gpt-bigcode-mha": Variant("gpt_bigcode", gpt2_sizes(multi_query=False, n_inner=40)),
    "gpt-bigcode-odd": Variant("gpt_bigcode", gpt2_sizes(n_embd=28, tie_word_embeddings=False)),
    "gemma": Variant("gemma", sizes(head_dim=16, num_key_value_heads=1)),
    "gemma-mha": Variant("gemma", sizes(head_dim=12, num_key_value_heads=4, attention_bias=True)),
    "gemma-untied": Variant("gemma", sizes(head_dim=8, tie_word_embeddings=False)),
    "phi": Variant("phi", sizes(**partly(0.5))),
    "phi-odd": Variant("phi", sizes(hidden_size=40, num_key_value_heads=4, **partly(0.4))),
    "phi3": Variant("phi3", sizes()),
    "phi3-window": Variant("phi3", sizes(sliding_window=7, num_key_value_heads=4, tie_word_embeddings=True)),
    "phi3-short": Variant("phi3", sizes(rope_parameters=longrope(4), **LONG_PHI), {"max_model_len": 32}),
    "phi4-partial": Variant(
        "phi3",
        sizes(hidden_size=64, rope_parameters=longrope(6, partial_rotary_factor=0.75), **LONG_PHI),
        {"max_model_len": 32},
    ),
    "stablelm": Variant("stablelm", sizes(use_qkv_bias=True, **partly(0.25))),
    "stablelm-parallel": Variant(
        "stablelm", sizes(use_parallel_residual=True, num_key_value_heads=4, tie_word_embeddings=True, **partly(0.5))
    ),
    "gpt-neox": Variant("gpt_neox", without(sizes(**partly(0.25)), "num_key_value_heads")),
    "gpt-neox-sequential": Variant(
        "gpt_neox",
        without(
            sizes(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, **partly(1.0)),
            "num_key_value_heads",
        ),
    ),
    "codegen": Variant("codegen", gpt2_sizes(rotary_dim=4)),
    "codegen-whole": Variant("codegen", gpt2_sizes(n_head=8, n_embd=48, rotary_dim=6, n_inner=40)),
    "granite": Variant("granite", sizes(**GRANITE)),
    "granite-tied": Variant("granite", sizes(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, **GRANITE)),
    "glm": Variant("glm", sizes(head_dim=8, **partly(0.5))),
    "glm-mqa": Variant("glm", sizes(head_dim=16, num_key_value_heads=1, attention_bias=False, **partly(0.5))),
    "glm4": Variant("glm4", sizes(head_dim=8, tie_word_embeddings=True, **partly(0.5))),
}


def write_variant(folder: Path, variant: Variant, seed: int = 0) -> Path:
    """Saves the checkpoint and returns its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(variant.name, **json.loads(json.dumps(variant.config)))
        model = AutoModelForCausalLM.from_config(config).eval()
        randomize(model, seed)
        model.save_pretrained(folder)
    return folder


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights so large that attention is far from uniform, and no norm and no bias is a neutral one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                is_embedding = "embed" in name or "wte" in name or "wpe" in name
                parameter.copy_(noise * (0.3 if is_embedding else 0.9 / parameter.shape[1] ** 0.5))
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:  # a norm; Gemma's are added to 1
                parameter.copy_(0.2 * noise + (0 if "Gemma" in type(model).__name__ else 1))
