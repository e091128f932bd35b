"""GLM-4's first form against transformers' later one: the same weights under other names, q, k and v stacked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tabstop.errors import UnsupportedModelError
from tests.models.families import VOCAB_SIZE, Variant, partly, sizes, write_variant
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.models.test_families import assert_same_logits, random_prompts

NAMES = {
    r"model\.embed_tokens\.(.+)": r"transformer.embedding.word_embeddings.\1",
    r"lm_head\.(.+)": r"transformer.output_layer.\1",
    r"model\.norm\.(.+)": r"transformer.encoder.final_layernorm.\1",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(.+)": r"transformer.encoder.layers.\1.self_attention.dense.\2",
    r"model\.layers\.(\d+)\.mlp\.gate_up_proj\.(.+)": r"transformer.encoder.layers.\1.mlp.dense_h_to_4h.\2",
    r"model\.layers\.(\d+)\.mlp\.down_proj\.(.+)": r"transformer.encoder.layers.\1.mlp.dense_4h_to_h.\2",
    r"model\.layers\.(\d+)\.(\w+_layernorm|input_layernorm)\.(.+)": r"transformer.encoder.layers.\1.\2.\3",
}


def first_form(folder: Path, **more: Any) -> Path:
    """The folder's checkpoint as it would have been published first."""
    weights: dict[str, np.ndarray] = {}
    stored = load_file(folder / "model.safetensors")
    for name, array in stored.items():
        match = next((found for pattern in NAMES if (found := re.fullmatch(pattern, name))), None)
        if match is not None:
            weights[match.expand(NAMES[match.re.pattern])] = array
        elif ".q_proj." in name:
            parts = [stored[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            layer, kind = name.split(".")[2], name.rpartition(".")[2]
            fused = f"transformer.encoder.layers.{layer}.self_attention.query_key_value.{kind}"
            weights[fused] = np.concatenate(parts)
    weights["transformer.rotary_pos_emb.inv_freq"] = np.ones(2, dtype=np.float32)
    target = folder.parent / "first"
    target.mkdir()
    save_file(weights, target / "model.safetensors")
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "hidden_size": 32,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "kv_channels": 8,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "padded_vocab_size": VOCAB_SIZE,
        "vocab_size": VOCAB_SIZE,
        "seq_length": 256,
        "layernorm_epsilon": 1.5625e-07,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "rmsnorm": True,
        "original_rope": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "rope_ratio": 3,
        "tie_word_embeddings": False,
    }
    (target / "config.json").write_text(json.dumps(config | more))
    return target


def glm(tmp_path: Path) -> Path:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 30000.0, "partial_rotary_factor": 0.5}}
    return write_variant(tmp_path / "later", Variant("glm", sizes(head_dim=8) | partly(0.5) | rope))


def test_the_logits_are_those_of_the_later_form(tmp_path: Path) -> None:
    folder = glm(tmp_path)
    first = first_form(folder)
    prompts = random_prompts("chatglm", 70)
    assert_same_logits(PagedRunner(load(first)), prompts, oracle_logits(folder, prompts))


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"original_rope is False; known: True"):
        load(first_form(glm(tmp_path), original_rope=False))
