"""The attention kernels against their twin, and the twin against torch's own attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tabstop.kernels.attention import Launch, Rows, View, attend_torch
from tabstop.kernels.decode import DecodePlan, decode_triton, longest_rows, plan_decode
from tabstop.kernels.prefix import plan_prefix, width_of
from tabstop.kernels.prompt import plan_prompt, prompt_triton
from tests.kernels.rows import DEVICE, HALVES, TOLERANCE, Shape, make_rows, poisoned, share


def check(result: torch.Tensor, expected: torch.Tensor, rows: Rows, served: list[int]) -> None:
    """Equal in the rows that the kernel serves; the poison is untouched elsewhere."""
    starts = rows.starts.tolist()
    written = torch.zeros(len(result), dtype=torch.bool)
    for row in served:
        written[starts[row] : starts[row + 1]] = True
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result[written], expected[written], rtol=tolerance, atol=tolerance)
    assert result[~written].isnan().all()


def decode(shape: Shape, lens: list[int], contexts: list[int], plan: DecodePlan, window: int | None = None) -> None:
    q, kv, rows = make_rows(shape, lens, contexts, window)
    view = View(0.3, window)
    result = poisoned(*q.shape, dtype=q.dtype)
    if plan.partial is not None and plan.weights is not None:
        plan.partial.fill_(torch.nan)
        plan.weights.fill_(torch.nan)
    decode_triton(q, kv, result, rows, plan, view)
    served = [row for row, length in enumerate(lens) if 0 < length <= plan.max_queries]
    check(result, attend_torch(q, kv, rows, view), rows, served)


def prompt(shape: Shape, lens: list[int], contexts: list[int], window: int | None = None, min_queries: int = 2) -> None:
    q, kv, rows = make_rows(shape, lens, contexts, window)
    view = View(0.3, window)
    heads = (shape.heads, shape.kv_heads, shape.dim)
    plan = plan_prompt(rows, min_queries, (len(lens), sum(lens)), heads, kv)
    result = poisoned(*q.shape, dtype=q.dtype)
    prompt_triton(q, kv, result, rows, plan, view)
    served = [row for row, length in enumerate(lens) if length >= min_queries]
    check(result, attend_torch(q, kv, rows, view), rows, served)


def whole(max_queries: int) -> DecodePlan:
    """Contexts are not split, as with many rows."""
    return DecodePlan(max_queries, 64, 1, Launch(64, 4, 3))


def make_plan(shape: Shape, num_rows: int, max_queries: int, num_splits: int) -> DecodePlan:
    like = torch.empty(0, dtype=shape.dtype, device=DEVICE)
    plan = plan_decode(num_rows, (shape.heads, shape.kv_heads, shape.dim), max_queries, 32 * num_splits, like)
    assert plan.num_splits == num_splits
    return plan


def test_the_twin_is_ordinary_attention() -> None:
    q, kv, rows = make_rows(Shape(4, 2, 16, block_size=4), [5, 1], [11, 7])
    result = attend_torch(q, kv, rows, View(0.5))
    for row, (first, last, context) in enumerate([(0, 5, 11), (5, 6, 7)]):
        gathered = kv[rows.tables[row, : -(-context // 4)].long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
        mask = torch.ones(last - first, context, dtype=torch.bool, device=DEVICE).tril(context - (last - first))
        expected = functional.scaled_dot_product_attention(
            q[first:last].transpose(0, 1), gathered[0], gathered[1], mask, scale=0.5, enable_gqa=True
        )
        torch.testing.assert_close(result[first:last], expected.transpose(0, 1))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_decoding_rows_of_any_context(num_splits: int, window: int | None) -> None:
    shape = Shape(2, 2, 16)
    contexts = [1, 16, 17, 63, 64, 65, 150]
    plan = whole(1) if num_splits == 1 else make_plan(shape, len(contexts), 1, num_splits)
    decode(shape, [1] * len(contexts), contexts, plan, window)


@pytest.mark.parametrize("window", [None, 1, 40])
def test_decoding_without_matrices(window: int | None) -> None:
    shape, contexts = Shape(2, 2, 24), [1, 16, 17, 63, 64, 65, 150]
    lens = [1, 1, 1, 2, 0, 1, 1]
    decode(shape, lens, contexts, replace(whole(1), packed=1), window)
    decode(shape, lens, contexts, replace(make_plan(shape, 7, 1, 3), packed=1), window)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_decoding_of_all_head_sizes(dim: int) -> None:
    decode(Shape(2, 1, dim), [1, 1], [40, 5], whole(1))
    decode(Shape(2, 1, dim), [1, 1], [70, 5], make_plan(Shape(2, 1, dim), 2, 1, 3))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (7, 1), (8, 2), (20, 1)])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_drafts_of_grouped_heads_beside_padding_and_prompts(heads: int, kv_heads: int, num_splits: int) -> None:
    shape = Shape(heads, kv_heads, 16, block_size=8)
    longest = longest_rows(heads // kv_heads)[1]
    lens = [1, 0, longest, 2, longest + 1, 0]
    contexts = [30, 0, longest, 45, 33, 0]
    plan = whole(longest) if num_splits == 1 else make_plan(shape, 6, longest, num_splits)
    decode(shape, lens, contexts, plan)


def test_splits_that_only_the_last_queries_see() -> None:
    shape = Shape(2, 1, 16)
    decode(shape, [8, 5], [66, 33], make_plan(shape, 2, 8, 3))
    decode(shape, [8, 5], [66, 33], make_plan(shape, 2, 8, 3), window=3)


@pytest.mark.parametrize("dtype", HALVES)
def test_decoding_in_half_precision(dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 64, dtype=dtype)
    decode(shape, [1, 1, 1], [7, 64, 130], whole(1))
    decode(shape, [1, 1, 1], [7, 64, 130], make_plan(shape, 3, 1, 4))


def decode_sharing(
    shape: Shape, contexts: list[int], groups: list[tuple[list[int], int]], num_splits: tuple[int, int]
) -> None:
    """Rows with one query each, and padding behind them; num_splits: of prefixes, of what is behind them."""
    lens = [1 if context else 0 for context in contexts]
    heads = (shape.heads, shape.kv_heads, shape.dim)
    width = width_of(shape.heads // shape.kv_heads, shape.dtype)
    q, kv, rows = make_rows(shape, lens, contexts)
    prefix = plan_prefix(share(kv, rows, groups, width), heads, kv)
    assert prefix is not None
    poison = poisoned(num_splits[0], len(contexts), shape.heads, shape.dim)
    weights = poison[..., 0].contiguous()
    prefix = replace(prefix, num_splits=num_splits[0], min_tiles=1, partial=poison, weights=weights)
    plan = plan_decode(len(contexts), heads, 1, 32 * num_splits[1], kv, prefix)
    plan = replace(plan, launch=Launch(32, 4, 3)) if num_splits[1] == 1 else plan
    result = poisoned(*q.shape, dtype=q.dtype)
    decode_triton(q, kv, result, rows, plan, View(0.3))
    check(result, attend_torch(q, kv, rows, View(0.3)), rows, [row for row, length in enumerate(lens) if length])
    sharers = [row for members, _ in groups for row in members]
    assert not prefix.partial[0, sharers].isnan().any()
    assert prefix.partial[:, [row for row in range(len(contexts)) if row not in sharers]].isnan().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"), [(2, 2, torch.float32), (8, 2, torch.float32), (7, 1, HALVES[0])]
)
@pytest.mark.parametrize("num_splits", [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_rows_that_share_prefixes(heads: int, kv_heads: int, dtype: torch.dtype, num_splits: tuple[int, int]) -> None:
    contexts = [129, 200, 257, 193, 140, 300, 0, 129, 150, 60, 130, 131, 132, 133, 0, 1]
    groups = [([0, 4, 7, 8, 10, 11, 12, 13], 128), ([1, 2, 3, 5], 192)]
    decode_sharing(Shape(heads, kv_heads, 16, dtype=dtype), contexts, groups, num_splits)


@pytest.mark.parametrize("dim", [24, 128, 256])
def test_shared_prefixes_of_all_head_sizes(dim: int) -> None:
    decode_sharing(Shape(2, 1, dim), [70, 70, 65, 80] + [1] * 12, [([0, 1, 2, 3], 64)], (1, 1))


@pytest.mark.parametrize("dtype", HALVES)
def test_shared_prefixes_in_half_precision(dtype: torch.dtype) -> None:
    decode_sharing(Shape(4, 2, 64, dtype=dtype), [200, 150, 190, 300] + [5] * 12, [([0, 1, 2, 3], 128)], (2, 2))


@pytest.mark.parametrize("window", [None, 1, 50])
def test_prompts_and_chunks_of_any_length(window: int | None) -> None:
    prompt(Shape(1, 1, 16), [1, 130, 0, 16, 2], [9, 130, 0, 90, 200], window)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_prompts_of_all_head_sizes(dim: int) -> None:
    prompt(Shape(2, 1, dim), [70, 9], [70, 77])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (7, 1), (48, 1)])
def test_prompts_of_grouped_heads(heads: int, kv_heads: int) -> None:
    prompt(Shape(heads, kv_heads, 16, block_size=8), [21, 1, 40], [100, 5, 40])


@pytest.mark.parametrize("dtype", HALVES)
def test_prompts_in_half_precision(dtype: torch.dtype) -> None:
    prompt(Shape(2, 1, 64, dtype=dtype), [40, 3], [100, 70])


def test_tiles_are_found_among_many_rows() -> None:
    lens = [1 + row % 40 for row in range(1500)]
    starts = torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32).to(DEVICE)
    rows = Rows(starts, starts[1:], starts[None])
    expected = [[row, first] for row, n in enumerate(lens) if n >= 39 for first in range((n - 1) // 16 * 16, -1, -16)]
    plan = plan_prompt(rows, 39, (len(expected) + 2, 0), (8, 1, 64), torch.empty(0, device=DEVICE))
    assert plan.tiles.tolist()[:-2] == expected
    assert plan.tiles[-2:, 0].tolist() == [-1, -1]
