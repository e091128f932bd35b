"""The reference backend against one loop over tokens and heads in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tabstop.attention import AttentionBatch, Need, make_backend
from tabstop.attention.reference import ReferenceAttention
from tabstop.cache import CacheKind, CacheSpec
from tabstop.engine.plan import Copy
from tests.models.paged import make_batch

HEADS, KV_HEADS, DIM, BLOCK_SIZE = 6, 2, 8, 4


def make(dtype: torch.dtype = torch.float32, num_blocks: int = 64) -> tuple[ReferenceAttention, torch.Tensor]:
    need = Need(HEADS, KV_HEADS, DIM, dtype, dtype, torch.device("cpu"), BLOCK_SIZE)
    backend = make_backend(need, "reference")
    assert isinstance(backend, ReferenceAttention)
    return backend, backend.allocate(CacheSpec(CacheKind.PAGED, KV_HEADS, DIM), num_blocks)


class Sequence:
    """One growing sequence with everything that it ever saw."""

    def __init__(self, blocks: list[int]) -> None:
        self.table = blocks
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []


def attend_by_hand(
    q: torch.Tensor, sequence: Sequence, position: int, scale: float, window: int | None
) -> torch.Tensor:
    """One token's query [heads, dim] over the positions that it may see."""
    first = 0 if window is None else max(0, position - window + 1)
    result = torch.empty(HEADS, DIM, dtype=torch.float64)
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        seen = range(first, position + 1)
        scores = [float(q[head].double() @ sequence.keys[place][kv_head].double()) * scale for place in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        values = torch.stack([sequence.values[place][kv_head].double() for place in seen])
        result[head] = torch.tensor(weights, dtype=torch.float64) @ values / sum(weights)
    return result


def run_step(
    backend: ReferenceAttention, kv: torch.Tensor, sequences: list[Sequence], lens: list[int], window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the backend's answer, the loop's) for `lens` more random tokens of each sequence."""
    starts = [len(sequence.keys) for sequence in sequences]
    batch: AttentionBatch = make_batch([each.table for each in sequences], starts, lens, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(sum(starts))
    q, k, v = (
        torch.randn(sum(lens), heads, DIM, generator=generator).to(kv.dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    owners = [(each, start + i) for each, start, n in zip(sequences, starts, lens, strict=True) for i in range(n)]
    for token, (sequence, _) in enumerate(owners):
        sequence.keys.append(k[token])
        sequence.values.append(v[token])
    result = backend.run(q, k, v, kv, backend.plan(batch), 0.7, window)
    expected = [
        attend_by_hand(q[token], owner, position, 0.7, window) for token, (owner, position) in enumerate(owners)
    ]
    return result, torch.stack(expected)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_steps_of_any_lengths_equal_the_loop(window: int | None) -> None:
    backend, kv = make()
    blocks = list(range(64))
    random.Random(0).shuffle(blocks)
    sequences = [Sequence(blocks[16 * index : 16 * index + 16]) for index in range(4)]
    for lens in ([9, 1, 4, 30], [1, 1, 1, 1], [5, 1, 1, 2], [1, 7, 7, 1], [2, 2, 2, 2]):
        result, expected = run_step(backend, kv, sequences, lens, window)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_bfloat16_is_attended_in_float32() -> None:
    backend, kv = make(torch.bfloat16)
    result, expected = run_step(backend, kv, [Sequence([3, 1, 2])], [11], None)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected.bfloat16(), rtol=2**-8, atol=0)  # only the result is rounded


def test_nothing_of_other_sequences_leaks_in_not_even_a_nan() -> None:
    backend, kv = make()
    kv.fill_(torch.nan)
    sequences = [Sequence([5, 9, 11, 12, 13]), Sequence([1, 2, 3, 4, 6, 7, 8, 10])]
    for sequence in sequences:
        kv[:, sequence.table] = 0  # what was there before is finite in a row's own blocks only
    for lens in ([17, 28], [1, 1], [1, 1]):  # the single tokens are attended together, one context padded
        result, expected = run_step(backend, kv, sequences, lens, None)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_the_order_of_storing_and_attending() -> None:
    """Two rows in one step share a block: the second sees what the first stores in this very step."""
    backend, kv = make()
    q, k, v = (torch.randn(5, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    batch = make_batch([[7, 3], [7, 5]], [0, 4], [4, 1], BLOCK_SIZE)
    result = backend.run(q, k, v, kv, backend.plan(batch), 1.0, None)
    alone_backend, alone_kv = make()
    alone = make_batch([[0, 1]], [0], [5], BLOCK_SIZE)
    expected = alone_backend.run(q, k, v, alone_kv, alone_backend.plan(alone), 1.0, None)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_copying_the_start_of_a_block() -> None:
    backend, kv = make()
    kv.copy_(torch.arange(kv.numel()).view(kv.shape))
    before = kv.clone()
    backend.copy([kv], [Copy(source=2, target=9, num_tokens=3)])
    assert torch.equal(kv[:, 9, :3], before[:, 2, :3])
    kv[:, 9, :3] = before[:, 9, :3]
    assert torch.equal(kv, before)
