"""What a missing key means is what transformers' configuration classes say, and old spellings read as new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tabstop.checkpoint import open_checkpoint
from tabstop.models import FAMILIES
from tabstop.models.config import ModelConfig, read_model_config
from tabstop.models.loader import build_model

REQUIRED = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "n_embd", "n_layer", "n_head"),
}
SAY_EVERYTHING = {"Ministral3ForCausalLM", "ChatGLMModel"}
"""Architectures whose published files leave nothing out, or whose class is not in transformers."""


def read(folder: Path, config: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(open_checkpoint(str(folder)))


def default_config(architecture: str) -> dict[str, Any]:
    """All values of the configuration class behind an architecture."""
    import transformers

    config_class = getattr(transformers, architecture).config_class
    values: dict[str, Any] = config_class().to_dict()
    return values | {"architectures": [architecture], "dtype": None}


def facts(config: ModelConfig) -> dict[str, Any]:
    names = ("num_kv_heads", "head_dim", "norm_eps", "rope", "tied_head", "max_position_embeddings")
    return {name: getattr(config, name) for name in (*names, "intermediate_size", "hidden_size", "num_layers")}


@pytest.mark.parametrize("architecture", sorted(set(FAMILIES) - SAY_EVERYTHING))
def test_missing_keys_mean_what_the_reference_takes(architecture: str, tmp_path: Path) -> None:
    full = default_config(architecture)
    bare = {key: value for key, value in full.items() if key in REQUIRED}
    if full.get("rope_parameters", {}).get("partial_rotary_factor", 1.0) == 1.0:
        full.pop("partial_rotary_factor", None)
    assert facts(read(tmp_path, bare)) == facts(read(tmp_path, full))
    ours, theirs = (build_model(read(tmp_path, config)) for config in (bare, full))
    assert str(ours) == str(theirs)
    first, second = ours.blocks[0].attention, theirs.blocks[0].attention
    assert (first.window, first.scale, first.qkv.has_bias) == (second.window, second.scale, second.qkv.has_bias)


OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GPTNeoXForCausalLM": (
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    "PhiForCausalLM": (
        {"partial_rotary_factor": 0.25, "rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    ),
    "LlamaForCausalLM": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ),
    "Phi3ForCausalLM": (
        {
            "rope_theta": 500.0,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
            "original_max_position_embeddings": 1024,
            "max_position_embeddings": 4096,
        },
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 1024,
                "rope_theta": 500.0,
            },
            "original_max_position_embeddings": 1024,
            "max_position_embeddings": 4096,
        },
    ),
}


@pytest.mark.parametrize("architecture", OLD)
def test_old_spellings_read_as_new_ones(architecture: str, tmp_path: Path) -> None:
    bare = {key: value for key, value in default_config(architecture).items() if key in REQUIRED}
    old, new = OLD[architecture]
    assert facts(read(tmp_path, bare | old)) == facts(read(tmp_path, bare | new))
    assert read(tmp_path, bare | old).rope.theta == 500.0


def test_messages_use_the_file_s_own_words(tmp_path: Path) -> None:
    bare = {key: value for key, value in default_config("GPTBigCodeForCausalLM").items() if key in REQUIRED}
    with pytest.raises(Exception, match=r"config\.json: n_head is 0; known: a whole number"):
        read(tmp_path, bare | {"n_head": 0})
    with pytest.raises(Exception, match=r"config\.json: layer_norm_epsilon is -1; known: a number over 0"):
        read(tmp_path, bare | {"layer_norm_epsilon": -1})
