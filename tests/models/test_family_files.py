"""GGUF files of every family that llama.cpp knows: the logits are those of the weights that the file decodes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabstop.errors import UnsupportedModelError
from tests.models.families import (
    GRANITE,
    LONG_PHI,
    VARIANTS,
    Variant,
    longrope,
    partly,
    sizes,
    without,
    write_variant,
)
from tests.models.family_files import Form, write_family
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.models.test_families import assert_same_logits, random_prompts

SCALES = {
    "attention.scale": GRANITE["attention_multiplier"],
    "embedding_scale": GRANITE["embedding_multiplier"],
    "residual_scale": GRANITE["residual_multiplier"],
    "logit_scale": GRANITE["logits_scaling"],
}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
LONG_KEYS = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.2649110640673518}

FORMS: dict[str, tuple[Variant, Form]] = {
    "mistral": (VARIANTS["mistral-window"], Form("llama", {"attention.sliding_window": 7}, has_pairs=True)),
    "qwen2-yarn": (VARIANTS["qwen2-yarn"], Form("qwen2", YARN_KEYS)),
    "qwen3": (VARIANTS["qwen3"], Form("qwen3")),
    "qwen3-tied": (VARIANTS["qwen3-tied"], Form("qwen3")),
    "starcoder2": (VARIANTS["starcoder2"], Form("starcoder2", {"attention.sliding_window": 11})),
    "starcoder2-untied": (VARIANTS["starcoder2-untied"], Form("starcoder2")),
    "gpt-bigcode": (VARIANTS["gpt-bigcode"], Form("starcoder")),
    "gpt-bigcode-odd": (VARIANTS["gpt-bigcode-odd"], Form("starcoder")),
    "gemma": (VARIANTS["gemma"], Form("gemma", norm_offset=1.0)),
    "phi": (VARIANTS["phi-odd"], Form("phi2")),
    "phi-stacked": (VARIANTS["phi"], Form("phi2", stacks_qkv=True)),
    "phi3": (VARIANTS["phi3"], Form("phi3", {"attention.sliding_window": 0})),
    "phi3-window": (VARIANTS["phi3-window"], Form("phi3", {"attention.sliding_window": 7})),
    "phi3-short": (
        Variant("phi3", sizes(rope_parameters=longrope(4), **LONG_PHI), {"max_model_len": 32}),
        Form("phi3", LONG_KEYS | {"rope.scaling.attn_factor": 1.2649110640673518}),
    ),
    "stablelm": (VARIANTS["stablelm"], Form("stablelm", {"use_parallel_residual": False})),
    "stablelm-parallel": (VARIANTS["stablelm-parallel"], Form("stablelm", {"use_parallel_residual": True})),
    "gpt-neox": (VARIANTS["gpt-neox"], Form("gptneox", {"use_parallel_residual": True}, has_packed_heads=True)),
    "gpt-neox-sequential": (
        VARIANTS["gpt-neox-sequential"],
        Form("gptneox", {"use_parallel_residual": False}, has_packed_heads=True),
    ),
    "granite": (VARIANTS["granite"], Form("granite", SCALES, has_pairs=True)),
    "granite-tied": (VARIANTS["granite-tied"], Form("granite", SCALES, has_pairs=True)),
    "glm": (VARIANTS["glm"], Form("chatglm")),
    "glm-stacked": (VARIANTS["glm"], Form("chatglm", stacks_qkv=True)),
    "glm4": (VARIANTS["glm4"], Form("glm4")),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_computes_as_the_checkpoint_it_was_made_of(name: str, tmp_path: Path) -> None:
    variant, form = FORMS[name]
    folder = write_variant(tmp_path, variant)
    file = write_family(folder, form)
    prompts = random_prompts(name, variant.options.get("max_model_len", 70))
    assert_same_logits(PagedRunner(load(file, **variant.options)), prompts, oracle_logits(folder, prompts))


WIDE = {"hidden_size": 64, "intermediate_size": 96}  # whole blocks

PACKED = {
    "qwen3": (Variant("qwen3", sizes(head_dim=32, **WIDE)), Form("qwen3")),
    "gpt-neox": (
        Variant("gpt_neox", without(sizes(**WIDE, **partly(0.25)), "num_key_value_heads")),
        Form("gptneox", {"use_parallel_residual": True}, has_packed_heads=True),
    ),
    "phi3": (Variant("phi3", sizes(**WIDE)), Form("phi3")),
    "glm": (
        Variant("glm", sizes(**WIDE, head_dim=16, **partly(0.5))),
        Form("chatglm", stacks_qkv=True),
    ),
}


@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_1", "F16"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_are_put_in_order_as_packed_rows(name: str, encoding: str, tmp_path: Path) -> None:
    variant, form = PACKED[name]
    folder = write_variant(tmp_path, variant)
    file = write_family(folder, form, encoding)
    prompts = random_prompts(name, 40)
    assert_same_logits(PagedRunner(load(file)), prompts, oracle_logits(folder, prompts))


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scaling.attn_factor", 0.5), ("rope.scaling.yarn_log_multiplier", 0.125)]
)
def test_yarn_keys_that_are_not_understood_are_refused(key: str, value: float, tmp_path: Path) -> None:
    variant, _ = FORMS["qwen2-yarn"]
    file = write_family(write_variant(tmp_path, variant), Form("qwen2", YARN_KEYS | {key: value}))
    with pytest.raises(UnsupportedModelError, match=rf"{key} is {value}, which is not known of yarn"):
        load(file)
