"""Whole steps in one call against their twin, the layers one by one, over the same tiles and the same attention."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tabstop.attention.cpu import CpuAttention
from tabstop.attention.reference import ReferenceAttention
from tabstop.kernels.cpu.library import refuse
from tabstop.models.compiled import CompiledDecoder, compile_steps
from tests.models.families import VARIANTS, Variant, write_variant
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.models.test_families import random_prompts

if reason := refuse():
    pytest.skip(reason, allow_module_level=True)


def in_whole_groups(variant: Variant) -> Variant:
    """What is inside an MLP is a multiple of 32, as in every real model."""
    key = "n_inner" if "n_embd" in variant.config else "intermediate_size"
    return replace(variant, config=variant.config | {key: 64})


def runners(folder: Path, **options: Any) -> tuple[PagedRunner, PagedRunner]:
    """(layer by layer, in one call)."""
    model: Any = load(folder, dtype="auto", **options)
    layers, whole = (PagedRunner(model, backend=CpuAttention) for _ in range(2))
    assert isinstance(whole.attention, CpuAttention)
    whole.model = CompiledDecoder(model, whole.attention)
    return layers, whole


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gpt-bigcode-odd"])  # heads of 7 are declined
def test_a_step_in_one_call_equals_its_layers(name: str, tmp_path: Path) -> None:
    """A rounding of inputs may fall on the other side: then a product differs by a 127th of its largest input."""
    variant = in_whole_groups(VARIANTS[name])
    folder = write_variant(tmp_path, variant)
    layers, whole = runners(folder, **variant.options)
    prompts = dict(enumerate(random_prompts(name, variant.options.get("max_model_len", 70) - 4)))
    for rows in (prompts, {2: [7], 0: [5], 4: [9, 3]}):
        expected, found = layers.step(rows), whole.step(rows)
        for index in rows:
            assert error(found[index], expected[index]) < 0.02
    alone = oracle_logits(folder, [prompts[1]])[0]
    assert error(whole.logits(prompts[1]), alone) < 0.06


def test_positions_far_beyond_those_before(tmp_path: Path) -> None:
    """Tables of angles grow."""
    layers, whole = runners(write_variant(tmp_path, in_whole_groups(VARIANTS["llama-yarn"])))
    short, long = [5, 6, 7], [3 + (7 * at) % 150 for at in range(700)]
    for prompt in (short, long, short):
        assert error(whole.logits(prompt), layers.logits(prompt)) < 0.02


@pytest.mark.parametrize(
    ("name", "reason"), [("llama-yarn", "48 values inside"), ("gpt-bigcode-mha", "40 values inside")]
)
def test_what_it_declines_is_computed_layer_by_layer(name: str, reason: str, tmp_path: Path) -> None:
    model: Any = load(write_variant(tmp_path, VARIANTS[name]), dtype="auto")
    runner = PagedRunner(model, backend=CpuAttention)
    served, how = compile_steps(model, runner.attention)
    assert served is model and reason in how
    assert runner.logits([4, 5, 6]).isfinite().all()


def test_other_weights_and_other_attention_are_declined(tmp_path: Path) -> None:
    folder = write_variant(tmp_path, in_whole_groups(VARIANTS["qwen2-yarn"]))
    dense: Any = load(folder)
    attention = PagedRunner(dense, backend=CpuAttention).attention
    assert "Linear holds DenseWeight, not tiles" in compile_steps(dense, attention)[1]
    reference = PagedRunner(dense, backend=ReferenceAttention).attention
    assert compile_steps(dense, reference) == (dense, "layer by layer")


def test_time_is_measured_by_operation(tmp_path: Path) -> None:
    _, whole = runners(write_variant(tmp_path, in_whole_groups(VARIANTS["qwen2-yarn"])))
    model: Any = whole.model
    model.seconds = (ctypes.c_double * len(model.program.operations))()
    whole.logits([4, 5, 6])
    assert len(model.seconds) == 2 * 9 + 1 and all(seconds > 0 for seconds in model.seconds)
