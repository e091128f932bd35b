"""Attention of rows with few new tokens (decoding, drafts) over paged KV memory, long contexts split among programs.

One program attends all queries of a row that share a KV head, packed into one tile (queries × group, at least 16), to
one split of the row's context, or of what of it kernels/prefix.py has not attended before; splits are merged by their
log-sum-exp (flash decoding; Dao et al., 2023). The grid depends on counts given by the host, everything else is read on
the device, so a CUDA graph may replay a launch with any rows that fit. Block ids are loaded one tile ahead: an id that
is loaded where it is used would leave a single tile of keys in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tabstop.kernels.attention import LOG2_E, UNIT, Launch, Rows, View, fold, load_ids, load_tile
from tabstop.kernels.language import ceil_div, early, follow, jit, next_power_of_2, tl
from tabstop.kernels.prefix import NOTHING_FOUND, PrefixPlan, num_splits_of, prefix_triton, start_softmax

MAX_QUERIES = 8  # of a row, by this kernel; fewer where a KV head serves many query heads
NARROW, WIDE = 16, 64  # rows of a packed tile
ENOUGH_PROGRAMS = 264  # two for each of 132 multiprocessors
MAX_SPLITS = 32
MIN_SPLIT = 32  # positions


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """A launch's counts, and the memory that splits are merged through; made once a step."""

    max_queries: int  # rows with more queries are left to others
    packed: int  # rows of a program's tile, queries × group; 1: one query of one head, by sums instead of matrices
    num_splits: int
    launch: Launch
    partial: torch.Tensor | None = None  # float32 [R · KV heads · splits · max_queries · group, dim]
    weights: torch.Tensor | None = None  # float32, the same but dim: log2 of the sum of exponentials
    prefix: PrefixPlan | None = None  # what is attended for many rows at once, before each row's rest


def longest_rows(group: int) -> tuple[int, int]:
    """(queries of a row that fit a narrow tile, queries of a row that fit a wide one); group = heads per KV head."""
    return max(1, min(MAX_QUERIES, NARROW // group)), max(1, min(MAX_QUERIES, WIDE // group))


def plan_decode(
    num_rows: int,
    heads: tuple[int, int, int],
    max_queries: int,
    max_context: int,
    like: torch.Tensor,
    prefix: PrefixPlan | None = None,
) -> DecodePlan:
    """heads: (query heads, KV heads, dim) · max_context: of the rows that a launch must serve, now or by replay.

    like: a tensor of the type of the KV memory, on its device.
    """
    num_heads, num_kv_heads, dim = heads
    num_splits = min(ceil_div(ENOUGH_PROGRAMS, num_rows * num_kv_heads), ceil_div(max_context, MIN_SPLIT), MAX_SPLITS)
    tile = 32 if num_splits > 1 or dim > 128 or like.element_size() > 2 else 64
    launch = Launch(tile, num_warps=4, num_stages=3)
    packed = max(NARROW, next_power_of_2(max_queries * num_heads // num_kv_heads))
    if num_splits == 1:
        return DecodePlan(max_queries, packed, 1, launch, prefix=prefix)
    size = num_rows * num_heads * num_splits * max_queries
    partial = like.new_empty(size, dim, dtype=torch.float32)
    weights = like.new_empty(size, dtype=torch.float32)
    return DecodePlan(max_queries, packed, num_splits, launch, partial, weights, prefix)


def decode_triton(
    q: torch.Tensor, kv: torch.Tensor, result: torch.Tensor, rows: Rows, plan: DecodePlan, view: View
) -> None:
    """q [T, heads, dim] → the same places of `result`, for rows with 1 to plan.max_queries queries; no others."""
    num_heads, dim = q.shape[1:]
    num_kv_heads, block_size = kv.shape[2:4]
    group = num_heads // num_kv_heads
    assert q.is_contiguous() and result.is_contiguous() and kv.is_contiguous()
    splits, launch = plan.num_splits > 1, plan.launch
    assert plan.packed >= plan.max_queries * group
    prefix = plan.prefix if view.window is None else None  # layers with and without windows share a plan
    shared = NOTHING_FOUND if prefix is None else prefix.found
    if prefix is not None:
        assert plan.packed > 1 and UNIT % launch.tile == 0
        prefix_triton(q, kv, rows, prefix, view.scale)
    sizes = (group, dim, next_power_of_2(dim), block_size, plan.packed, launch.tile, view.window or 0, splits, UNIT)
    pointers = (q, kv, result, plan.partial, plan.weights, *shared, rows.starts, rows.contexts, rows.tables)
    grid = (num_kv_heads, len(rows.contexts), plan.num_splits)
    counts = (view.scale * LOG2_E, rows.tables.stride(0), plan.max_queries)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    decode_kernel[grid](*pointers, *counts, *sizes, launch.num_stages, **options, **early(q))
    if splits:
        merge = (group, dim, next_power_of_2(dim), launch.tile, view.window or 0, next_power_of_2(plan.num_splits))
        merge_grid = (num_heads, len(rows.contexts), plan.max_queries)
        merge_kernel[merge_grid](
            *(result, plan.partial, plan.weights, shared[0], rows.starts, rows.contexts, plan.num_splits),
            *merge,
            num_warps=4,
            **early(q),
        )


@jit()
def share_of_split(
    context: tl.tensor,
    num_queries: tl.tensor,
    shared: tl.tensor,
    num_splits: tl.tensor,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(first tile behind what is shared that any query of the row sees, end of tiles, tiles a split)."""
    first = shared // TILE
    if WINDOW > 0:
        first = tl.maximum(context - num_queries - WINDOW + 1, 0) // TILE
    end = tl.cdiv(context, TILE)
    return first, end, tl.cdiv(end - first, num_splits)


@jit("max_queries", "stride_table", "prefix_splits", "min_tiles")
def decode_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    result: tl.tensor,
    partial: tl.tensor,
    weights: tl.tensor,
    shared: tl.tensor,
    prefix_partial: tl.tensor,
    prefix_weights: tl.tensor,
    prefix_splits: tl.tensor,
    min_tiles: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    scale: tl.tensor,
    stride_table: tl.tensor,
    max_queries: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (KV head, row, split)."""
    follow(EARLY)
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row).to(tl.int64)
    num_queries = (tl.load(starts + row + 1) - start).to(tl.int32)
    context = tl.load(contexts + row)
    if (num_queries == 0) | (num_queries > max_queries):
        return
    before = load_shared(shared, row)
    first, end, tiles = share_of_split(context, num_queries, before, tl.num_programs(2), TILE, WINDOW)
    begin = first + split * tiles
    end = tl.minimum(end, begin + tiles)
    if begin >= end:
        return
    packed = tl.arange(0, PACKED)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    query = packed // GROUP
    position = context - num_queries + query
    token_heads = (start + query) * (tl.num_programs(0) * GROUP) + head * GROUP + packed % GROUP
    inside = (query < num_queries)[:, None] & (column < DIM)
    queries = tl.load(q + token_heads[:, None] * DIM + column, inside, other=0.0)

    stride_split = tl.num_programs(1) * tl.num_programs(0) * GROUP
    top, total, sums = start_softmax(
        prefix_partial, prefix_weights, (row * tl.num_programs(0) + head) * GROUP + packed, stride_split,
        tl.where(split == 0, num_splits_of(before // UNIT, prefix_splits, min_tiles), 0),
        (query < num_queries)[:, None], PACKED, TILE, DIM, BLOCK_DIM,
    )  # fmt: skip
    top, total, sums = attend_tiles(
        top, total, sums, queries, kv + head * BLOCK_SIZE * DIM, tables + row.to(tl.int64) * stride_table,
        context, position, scale, begin, end, tl.num_programs(0), DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, STAGES,
    )  # fmt: skip
    mean = sums / tl.maximum(total, 1e-30)[:, None]
    if SPLITS:
        width = max_queries * GROUP
        place = ((row * tl.num_programs(0) + head) * tl.num_programs(2) + split) * width + packed
        tl.store(partial + place.to(tl.int64)[:, None] * DIM + column, mean, inside)
        tl.store(weights + place, top + tl.log2(tl.maximum(total, 1e-30)), query < num_queries)
    else:
        tl.store(result + token_heads[:, None] * DIM + column, mean.to(result.dtype.element_ty), inside)


@jit()
def load_shared(shared: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Positions of the row that are attended already; shared: None where none are."""
    if shared is None:
        return 0
    else:  # Triton compiles what follows a return
        return tl.load(shared + row)


@jit()
def attend_tiles(
    top: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    table: tl.tensor,
    context: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    num_kv_heads: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The online softmax goes on with tiles begin to end; keys: of this head in block 0."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    place = begin * TILE + tl.arange(0, TILE)
    oldest = 0
    if WINDOW > 0:
        oldest = tl.min(position, 0) - WINDOW + 1
    to_values = num_kv_heads * BLOCK_SIZE * DIM
    ids = load_ids(table, place, (place < context) & (place >= oldest), BLOCK_SIZE)
    for _ in tl.range(begin, end, num_stages=STAGES):
        read = (place < context) & (place >= oldest)
        offsets = ids.to(tl.int64) * (2 * to_values) + place % BLOCK_SIZE * DIM
        pointers = keys + offsets[:, None] + column
        k = load_tile(pointers, read[:, None], DIM, BLOCK_DIM, "evict_first")
        v = load_tile(pointers + to_values, read[:, None], DIM, BLOCK_DIM, "evict_first")
        visible = place[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= place[None, :] > position[:, None] - WINDOW
        place += TILE
        ids = load_ids(table, place, (place < context) & (place >= oldest), BLOCK_SIZE)
        if queries.shape[0] == 1:
            top, total, sums = fold_alone(queries, k, v, read, scale, top, total, sums)
        else:
            top, total, sums = fold(queries, k.to(queries.dtype), v.to(queries.dtype), visible, scale, top, total, sums)
    if queries.shape[0] == 1:
        top, total, sums = merge_lanes(top, total, sums)
    return top, total, sums


@jit()
def fold_alone(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    visible: tl.tensor,
    scale: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One query q [1, D]: each of the tile's N places has a softmax of its own, so nothing is reduced across them."""
    scores = tl.sum(k.to(tl.float32) * q.to(tl.float32), 1) * scale
    scores = tl.where(visible, scores, -1e30)
    new_top = tl.maximum(top, scores)
    weights = tl.exp2(scores - new_top)
    shrink = tl.exp2(top - new_top)
    sums = sums * shrink[:, None] + weights[:, None] * v.to(tl.float32)
    return new_top, total * shrink + weights, sums


@jit()
def merge_lanes(top: tl.tensor, total: tl.tensor, sums: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The softmax of all lanes [N], as of one query: [1], [1], [1, D]."""
    highest = tl.max(top, 0, keep_dims=True)
    share = tl.exp2(top - highest)
    return highest, tl.sum(total * share, 0, keep_dims=True), tl.sum(sums * share[:, None], 0, keep_dims=True)


@jit("num_splits")
def merge_kernel(
    result: tl.tensor,
    partial: tl.tensor,
    weights: tl.tensor,
    shared: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (head, row, query): splits weighted by their sums of exponentials; those left empty are not read."""
    follow(EARLY)
    head, row, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + row).to(tl.int64)
    num_queries = (tl.load(starts + row + 1) - start).to(tl.int32)
    context = tl.load(contexts + row)
    if (query >= num_queries) | (num_queries > tl.num_programs(2)):
        return
    first, end, tiles = share_of_split(context, num_queries, load_shared(shared, row), num_splits, TILE, WINDOW)
    split = tl.arange(0, BLOCK_SPLITS)
    used = split * tiles < end - first
    column = tl.arange(0, BLOCK_DIM)[None, :]
    width = tl.num_programs(2) * GROUP
    kv_head = row * (tl.num_programs(0) // GROUP) + head // GROUP
    place = (kv_head * num_splits + split) * width + query * GROUP + head % GROUP
    logs = tl.load(weights + place, used, other=-1e30)
    share = tl.exp2(logs - tl.max(logs, 0))
    inside = used[:, None] & (column < DIM)
    means = tl.load(partial + place.to(tl.int64)[:, None] * DIM + column, inside, other=0.0)
    merged = tl.sum(means * share[:, None], 0) / tl.sum(share, 0)
    column = tl.arange(0, BLOCK_DIM)
    target = result + ((start + query) * tl.num_programs(0) + head) * DIM + column
    tl.store(target, merged.to(result.dtype.element_ty), column < DIM)
