"""The Triton backend through the protocol, against the reference backend, step by step on growing sequences."""

from __future__ import annotations

import random

import pytest
import torch

from tabstop.attention import AttentionBackend, AttentionBatch, FusedBackend, Need, load_backend, make_backend
from tabstop.attention.reference import ReferenceAttention
from tabstop.attention.triton import TritonAttention
from tabstop.cache import CacheKind, CacheSpec
from tabstop.engine.plan import Copy
from tabstop.layers.rope import Rotary, rotate
from tests.kernels.rows import DEVICE
from tests.models.paged import make_batch

STEPS = [[30, 1, 9, 20], [1, 1, 1, 1], [5, 1, 40, 2], [8, 8, 7, 1], [2, 2, 2, 2]]


def make_need(heads: int, kv_heads: int, dim: int = 16, block_size: int = 16) -> Need:
    return Need(heads, kv_heads, dim, torch.float32, torch.float32, DEVICE, block_size)


def on_device(batch: AttentionBatch) -> AttentionBatch:
    for name in ("query_starts", "contexts", "block_tables", "kv_slots"):
        setattr(batch, name, getattr(batch, name).to(DEVICE))
    return batch


class Steps:
    """Four sequences in shuffled blocks, stepped through by several backends alike."""

    def __init__(self, need: Need) -> None:
        self.need = need
        self.tables = list(torch.randperm(32, generator=torch.Generator().manual_seed(1)).view(4, 8).tolist())
        self.lens = [0, 0, 0, 0]

    def next(self, lens: list[int]) -> tuple[AttentionBatch, torch.Tensor]:
        """The step's rows, and its qkv [T, heads, dim]."""
        batch = make_batch(self.tables, self.lens, lens, self.need.block_size)
        self.lens = [start + length for start, length in zip(self.lens, lens, strict=True)]
        generator = torch.Generator().manual_seed(sum(self.lens))
        num_heads = self.need.num_heads + 2 * self.need.num_kv_heads
        return on_device(batch), torch.randn(sum(lens), num_heads, self.need.head_dim, generator=generator).to(DEVICE)


def allocate(backend: AttentionBackend, need: Need, num_blocks: int = 32) -> torch.Tensor:
    kv: torch.Tensor = backend.allocate(CacheSpec(CacheKind.PAGED, need.num_kv_heads, need.head_dim), num_blocks)
    return kv


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (20, 1)])
def test_steps_of_any_lengths_equal_the_reference(heads: int, kv_heads: int, window: int | None) -> None:
    need = make_need(heads, kv_heads)
    steps, backends = Steps(need), [ReferenceAttention(need), TritonAttention(need)]
    memories = [allocate(backend, need) for backend in backends]
    for lens in STEPS:
        batch, qkv = steps.next(lens)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        expected, result = (
            backend.run(q, k, v, kv, backend.plan(batch), 0.3, window)
            for backend, kv in zip(backends, memories, strict=True)
        )
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_rotating_and_storing_at_once_equals_doing_it_before() -> None:
    need = make_need(6, 2)
    steps, reference, backend = Steps(need), ReferenceAttention(need), TritonAttention(need)
    assert isinstance(backend, FusedBackend) and not isinstance(reference, FusedBackend)
    expected_kv, kv = allocate(reference, need), allocate(backend, need)
    for lens in STEPS[:3]:
        batch, qkv = steps.next(lens)
        angles = torch.rand(len(qkv), 1, 8, device=DEVICE) * 6
        rotary = Rotary(angles.cos(), angles.sin())
        turned = rotate(qkv[:, :8], rotary)
        expected = reference.run(
            turned[:, :6], turned[:, 6:], qkv[:, 8:], expected_kv, reference.plan(batch), 0.3, None
        )
        meta = backend.plan(batch)
        q = backend.rotate_and_store(qkv.flatten(1), rotary.cos, rotary.sin, kv, meta)
        result = backend.attend(q, kv, meta, 0.3, None)
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_a_plan_made_for_more_serves_less() -> None:
    """As a captured graph does: grids of the largest step, other rows, padding behind them."""
    need = make_need(6, 2)
    backend = TritonAttention(need)
    largest = make_batch([[0] * 8] * 4, [127, 127, 127, 88], [1, 1, 1, 40], 16)
    steps, reference = Steps(need), ReferenceAttention(need)
    expected_kv, kv = allocate(reference, need), allocate(backend, need)
    for lens in ([1, 30, 1, 1], [1, 1, 1, 1], [1, 2, 1, 7]):
        batch, qkv = steps.next(lens)
        q, k, v = qkv.split([6, 2, 2], dim=1)
        expected = reference.run(q, k, v, expected_kv, reference.plan(batch), 0.3, None)
        padding = 44 - sum(lens)
        for name in ("contexts", "block_tables"):
            setattr(largest, name, getattr(batch, name))
        largest.query_starts = batch.query_starts
        largest.kv_slots = torch.cat([batch.kv_slots, batch.kv_slots.new_full((padding,), -1)])
        padded = torch.cat([qkv, torch.full((padding, *qkv.shape[1:]), torch.nan, device=DEVICE)])
        q, k, v = padded.split([6, 2, 2], dim=1)
        result = backend.run(q, k, v, kv, backend.plan(largest), 0.3, None)
        torch.testing.assert_close(result[: sum(lens)], expected, rtol=2e-5, atol=2e-5)
        assert kv.isfinite().all()


def test_copies_of_the_starts_of_blocks() -> None:
    need = make_need(2, 2, block_size=4)
    backend = TritonAttention(need)
    layers = [torch.randn_like(allocate(backend, need, 6)) for _ in range(2)]
    before = [layer.clone() for layer in layers]
    backend.copy(layers[:1], [Copy(2, 5, 3)])
    backend.copy(layers[1:], [Copy(2, 5, 3), Copy(2, 0, 1)])
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer[5, :, :, :3], old[2, :, :, :3])
        assert torch.equal(layer[5, :, :, 3:], old[5, :, :, 3:])
        assert torch.equal(layer[1:5], old[1:5])
    assert torch.equal(layers[1][0, :, :, :1], before[1][2, :, :, :1])


def test_it_is_chosen_on_gpus_and_declines_elsewhere_with_a_reason() -> None:
    on_gpu = Need(2, 2, 64, torch.bfloat16, torch.bfloat16, torch.device("cuda"), 16)
    on_cpu = (
        make_need(2, 2)
        if DEVICE.type == "cpu"
        else Need(2, 2, 64, torch.float32, torch.float32, torch.device("cpu"), 16)
    )
    assert load_backend("triton").refuse(on_gpu) is None
    assert isinstance(make_backend(on_gpu), TritonAttention)
    assert isinstance(make_backend(on_cpu), ReferenceAttention)
    assert "NVIDIA" in str(TritonAttention.refuse(on_cpu))
    odd = Need(2, 2, 20, torch.bfloat16, torch.bfloat16, torch.device("cuda"), 16)
    assert "multiples of 8" in str(TritonAttention.refuse(odd))


def test_which_rows_are_decoding() -> None:
    backend = TritonAttention(make_need(28, 4))
    lens = [random.Random(0).choice([1, 9, 300]) for _ in range(20)]
    assert backend._longest_decoding_row(lens) == 2
    assert backend._longest_decoding_row([*lens, *[8] * 20]) == 8
