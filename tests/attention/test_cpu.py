"""The CPU's own backend through the protocol, against the reference backend, step by step on growing sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tabstop.attention import Need
from tabstop.attention.cpu import CpuAttention
from tabstop.attention.reference import ReferenceAttention
from tabstop.engine.plan import Copy
from tabstop.kernels.cpu.library import Threads
from tests.attention.steps import NUM_BLOCKS, STEPS, Steps, allocate
from tests.models.paged import make_batch

if reason := CpuAttention.refuse(Need(1, 1, 16, torch.float32, torch.bfloat16, torch.device("cpu"), block_size=16)):
    pytest.skip(reason, allow_module_level=True)


def make_need(heads: int, kv_heads: int, dim: int = 16, block_size: int = 16) -> Need:
    return Need(heads, kv_heads, dim, torch.float32, torch.bfloat16, torch.device("cpu"), block_size)


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(2, 2, 16, 16), (9, 3, 64, 16), (20, 1, 80, 32), (7, 7, 6, 16), (14, 2, 128, 48), (2, 1, 258, 16)],
)
def test_steps_of_any_lengths_equal_the_reference(
    heads: int, kv_heads: int, dim: int, block_size: int, window: int | None
) -> None:
    need = make_need(heads, kv_heads, dim, block_size)
    steps, reference, backend = Steps(need), ReferenceAttention(need), CpuAttention(need)
    expected_kv, kv = allocate(reference, need), allocate(backend, need)
    kv[sorted(set(range(NUM_BLOCKS)).difference(*steps.tables))] = torch.nan  # where no table points
    for lens in STEPS:
        batch, (q, k, v) = steps.next(lens)
        expected = reference.run(q, k, v, expected_kv, reference.plan(batch), dim**-0.5, window)
        result = backend.run(q, k, v, kv, backend.plan(batch), dim**-0.5, window)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-2)  # weights are rounded to bfloat16
        error = (result - expected).norm() / expected.norm()
        assert error < 3e-3


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(num_threads: int) -> None:
    """To the last bit, whoever computes which spans, and whatever others left behind a row's end."""
    need = make_need(6, 2, 64)
    steps, backend = Steps(need), CpuAttention(need)
    together, alone = allocate(backend, need), allocate(backend, need)
    before = Threads.count
    together.fill_(torch.nan)
    try:
        for lens in STEPS:
            starts = list(steps.lens)
            batch, (q, k, v) = steps.next(lens)
            Threads.count = num_threads
            result = backend.run(q, k, v, together, backend.plan(batch), 0.125, None)
            Threads.count = 1
            first = 0
            for row, length in enumerate(lens):
                own = make_batch([steps.tables[row]], [starts[row]], [length], need.block_size)
                parts = [each[first : first + length] for each in (q, k, v)]
                expected = backend.run(*parts, alone, backend.plan(own), 0.125, None)
                assert torch.equal(result[first : first + length], expected)
                first += length
    finally:
        Threads.count = before


def test_copies_of_the_starts_of_blocks() -> None:
    need = make_need(2, 2, 16, 32)
    backend = CpuAttention(need)
    layers = [allocate(backend, need) for _ in range(2)]
    for layer in layers:
        layer.copy_(torch.randn(layer.shape))
    before = [layer.clone() for layer in layers]
    backend.copy(layers, [Copy(2, 5, 3), Copy(2, 0, 20)])
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer[5], old[2]) and torch.equal(layer[0], old[2])
        assert torch.equal(layer[1:5], old[1:5])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 4}, "multiple of 16"),
        ({"kv_dtype": torch.float32}, "bfloat16 cache"),
        ({"head_dim": 7}, "even number"),
        ({"device": torch.device("meta")}, "runs on the CPU"),
    ],
)
def test_what_it_declines(change: dict[str, object], reason: str) -> None:
    found = CpuAttention.refuse(replace(make_need(2, 2), **change))
    assert found is not None and reason in found
