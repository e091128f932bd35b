"""Config values are understood or refused by name; nothing is silently ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import UnsupportedModelError
from tabstop.models.config import ModelConfig, read_model_config
from tabstop.models.loader import build_model
from tabstop.models.rope import Llama3Scaling, RopeConfig
from tests.tiny import llama_config, qwen2_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(folder: Path, config: dict[str, Any]) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_model_config(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            r"architectures is \['MambaForCausalLM'\]; known: LlamaForCausalLM, Q",
        ),
        ({"architectures": None}, r"architectures is None; known: Llama"),
        ({"hidden_size": 0}, r"hidden_size is 0; known: a whole number from 1 to"),
        ({"hidden_size": 32.0}, r"hidden_size is 32\.0; known: a whole number"),
        ({"hidden_size": True}, r"hidden_size is True; known: a whole number"),
        ({"vocab_size": "300"}, r"vocab_size is '300'"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3; known: a divisor of num_attention_heads \(4\)"),
        ({"head_dim": 7}, r"head_dim is 7; rotary embeddings need an even number"),
        ({"head_dim": None, "hidden_size": 30}, r"hidden_size is 30; known: a multiple of num_attention_heads \(4\)"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps is -1; known: a number over 0"),
        ({"rope_theta": float("inf")}, r"rope_theta is inf"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 4}},
            r"rope_scaling: rope_type is 'proportional'; known: 'default', 'l",
        ),
        ({"rope_scaling": {"type": "dynamic"}}, r"rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, r"rope_scaling: truncate is 1; known: true"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling: factor is missing"),
        ({"rope_scaling": "linear"}, r"rope_scaling is 'linear'; known: an object"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, r"high_freq_factor is 1\.0; known: a number over low_f"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters: short_factor is missing; known: 4 numb"),
        (
            {"rope_parameters": {"rope_type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 3}},
            r"long_factor is \[1\.0, 1\.0, 1\.0\]; known: 4 numbers over 0",
        ),
        ({"rope_scaling": {"rope_type": "divisors"}}, r"divisors is missing; known: 4 numbers over 0"),
        ({"rope_scaling": {"rope_type": "divisors", "divisors": [1.0, 2.0, 0.0, 1.0]}}, r"divisors is \[1\.0, 2\.0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; known: 1\.0"),
        ({"torch_dtype": "float8"}, r"torch_dtype is 'float8'; known: 'float32', 'bfloat16', 'float16'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quant_method is 'gptq'; known: none"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings is 'yes'; known: true, false"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path, llama_config(**change))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama_config(hidden_act="gelu"), r"hidden_act is 'gelu'; known: 'silu'"),
        (llama_config(attention_bias=1), r"attention_bias is 1; known: true, false"),
        (qwen2_config(use_sliding_window=True, sliding_window=64), r"use_sliding_window is True; known: False"),
    ],
)
def test_what_the_family_does_not_understand_is_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build_model(read(tmp_path, config))


def test_both_spellings_of_rope_say_the_same(tmp_path: Path) -> None:
    expected = RopeConfig(5e5, 8, Llama3Scaling(8.0, 1.0, 4.0, 512))
    apart = llama_config(rope_theta=5e5, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 512})
    together = llama_config(rope_parameters=LLAMA3 | {"rope_theta": 5e5})  # the context's length is the default
    assert read(tmp_path, apart).rope == expected
    assert read(tmp_path, together).rope == expected


def test_missing_keys_take_the_architecture_s_defaults(tmp_path: Path) -> None:
    config = llama_config()
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings", "torch_dtype"):
        del config[key]
    model = read(tmp_path, config)
    assert (model.num_kv_heads, model.head_dim, model.rope, model.tied_head) == (4, 8, RopeConfig(10000.0, 8), False)
    assert model.dtype is None


def test_remote_code_is_neither_run_nor_needed(tmp_path: Path) -> None:
    config = llama_config(auto_map={"AutoModelForCausalLM": "evil.Evil"})
    tmp_path.joinpath("evil.py").write_text("raise SystemExit('remote code ran')")
    assert read(tmp_path, config).architecture == "LlamaForCausalLM"
