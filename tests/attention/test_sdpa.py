"""Attention by PyTorch's fused kernel against the reference backend, step by step on growing sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tabstop.attention import FusedBackend, Need
from tabstop.attention.reference import ReferenceAttention, attend, mask_of
from tabstop.attention.sdpa import Memory, SdpaAttention, attend_batched, find_runs
from tabstop.cache import CacheKind, CacheSpec
from tabstop.engine.plan import Copy
from tabstop.layers.rope import Rotary, rotate
from tests.attention.steps import NUM_BLOCKS, STEPS, Steps, allocate
from tests.quant.test_tiles import error


def make_need(heads: int, kv_heads: int, dim: int) -> Need:
    return Need(heads, kv_heads, dim, torch.bfloat16, torch.bfloat16, torch.device("cpu"), 16)


def stored(kv: Memory) -> torch.Tensor:
    """In the reference's layout."""
    return kv.whole.permute(0, 2, 3, 1, 4)


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("is_scattered", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (9, 3, 64), (14, 2, 128)])
def test_steps_of_any_lengths_equal_the_reference(
    heads: int, kv_heads: int, dim: int, is_scattered: bool, window: int | None
) -> None:
    need = make_need(heads, kv_heads, dim)
    steps, reference, backend = Steps(need), ReferenceAttention(need), SdpaAttention(need)
    if not is_scattered:
        steps.tables = [list(range(60 * row, 60 * row + 60)) for row in (2, 0, 3, 1)]
    expected_kv, kv = allocate(reference, need), backend.allocate(CacheSpec(CacheKind.PAGED, kv_heads, dim), NUM_BLOCKS)
    for lens in [*STEPS, [1], [40], [1]]:
        steps.tables, steps.lens = steps.tables[: len(lens)], steps.lens[: len(lens)]
        batch, (q, k, v) = steps.next(lens)
        expected = reference.run(q, k, v, expected_kv, reference.plan(batch), dim**-0.5, window)
        narrow = [each.bfloat16() for each in (q, k, v)]
        plan = backend.plan(batch)
        assert all((row.first_slot is None) == (is_scattered and row.context > 16) for row in plan.lone)
        actual = backend.run(*narrow, kv, plan, dim**-0.5, window)
        assert error(actual.float(), expected) < 1e-2
    assert torch.equal(stored(kv), expected_kv)


@pytest.mark.parametrize(("length", "has_products", "is_batched"), [(260, 1, True), (200, 1, False), (260, 0, False)])
def test_many_places_are_attended_in_two_products(
    length: int, has_products: int, is_batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    need, calls = make_need(9, 3, 64), []
    monkeypatch.setattr("tabstop.attention.sdpa.has_batched_products", lambda: bool(has_products))
    monkeypatch.setattr("tabstop.attention.sdpa.attend_batched", lambda q, *_: calls.append(len(q)) or q)
    steps, backend = Steps(need), SdpaAttention(need)
    kv = backend.allocate(CacheSpec(CacheKind.PAGED, 3, 64), NUM_BLOCKS)
    for lens in ([length] * 4, [1] * 4):
        batch, (q, k, v) = steps.next(lens)
        backend.run(*(each.bfloat16() for each in (q, k, v)), kv, backend.plan(batch), 0.125, None)
    assert calls == [4] * is_batched


@pytest.mark.parametrize("lens", [[1], [50], [1, 1, 1], [20, 1, 3, 3]])
def test_it_turns_and_stores_at_once(lens: list[int]) -> None:
    need = make_need(6, 2, 64)
    steps, reference, backend = Steps(need), ReferenceAttention(need), SdpaAttention(need)
    assert isinstance(backend, FusedBackend)
    batch, (q, k, v) = steps.next([*lens, *[1] * (4 - len(lens))])
    angles = torch.rand(len(q), 1, 32) * 6
    turned = rotate(torch.cat((q, k), 1), Rotary(angles.cos(), angles.sin()))
    expected_kv, kv = allocate(reference, need), backend.allocate(CacheSpec(CacheKind.PAGED, 2, 64), NUM_BLOCKS)
    expected = reference.run(turned[:, :6], turned[:, 6:], v, expected_kv, reference.plan(batch), 0.125, None)
    qkv, plan = torch.cat((q, k, v), 1).flatten(1).bfloat16(), backend.plan(batch)
    for _ in range(2):  # layers
        result = backend.rotate_and_store(qkv.clone(), angles.cos(), angles.sin(), kv, plan)
        assert error(backend.attend(result, kv, plan, 0.125, None).float(), expected) < 1e-2
    assert error(stored(kv).float(), expected_kv.float()) < 1e-2


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (9, 3, 64)])
def test_rows_of_one_query_are_attended_as_by_the_twin(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    """Scores of some 20, gathered and masked as in a step; what is masked is large."""
    rows, length = 6, 48
    contexts = torch.tensor([33, 48, 40, 34, 47, 41])
    gathered = torch.randn(2, kv_heads, rows, length, dim).bfloat16()
    gathered[:, :, torch.arange(length) >= contexts[:, None]] = 100.0
    keys, values = gathered.transpose(1, 2)
    q = 3 * torch.randn(rows, heads, dim).bfloat16()
    mask = mask_of(contexts[:, None, None, None] - 1, torch.arange(length), window, heads // kv_heads)
    expected = attend(q.float(), keys.float(), values.float(), mask, dim**-0.5)
    found = attend_batched(q, keys, values, mask.bfloat16(), dim**-0.5)
    assert found.shape == expected.shape and error(found.float(), expected) < 2e-2
    assert error(attend(q, keys, values, mask.bfloat16(), dim**-0.5).float(), expected) < 1e-2


def test_copies_of_the_starts_of_blocks() -> None:
    need = make_need(2, 2, 16)
    backend, reference = SdpaAttention(need), ReferenceAttention(need)
    kv = backend.allocate(CacheSpec(CacheKind.PAGED, 2, 16), 8)
    kv.whole.copy_(torch.randn(kv.whole.shape))
    expected = stored(kv).clone()
    copies = [Copy(2, 5, 3), Copy(2, 0, 16)]
    backend.copy([kv], copies)
    reference.copy([expected], copies)
    assert torch.equal(stored(kv), expected)


@pytest.mark.parametrize("num_runs", [1, 2, 5, 40])
def test_runs_of_slots_are_all_slots(num_runs: int) -> None:
    generator = np.random.default_rng(num_runs)
    starts = 1000 * generator.permutation(num_runs)
    slots = np.concatenate([np.arange(start, start + generator.integers(1, 100)) for start in starts])
    runs = find_runs(slots)
    assert len(runs) == num_runs and len(find_runs(starts)) == (num_runs == 1)
    assert [token for tokens, _ in runs for token in range(tokens.start, tokens.stop)] == list(range(len(slots)))
    assert [slot for _, where in runs for slot in range(where.start, where.stop)] == slots.tolist()
