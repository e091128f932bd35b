"""Attention of rows with many new tokens (prompts and their chunks) over paged KV memory.

A program attends one tile of a row's queries, packed with the group of heads that share a KV head, to the row's whole
context: first the tiles that every query sees, without masks, then those on the diagonal. Which tile of which row a
program gets is found on the device once a step, so that a CUDA graph may replay a launch with any rows that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tabstop.kernels.attention import LOG2_E, Launch, Rows, View, fold, load_ids, load_tile
from tabstop.kernels.language import early, follow, jit, next_power_of_2, tl

SEARCH = 1024  # rows looked at together


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Which tiles of queries a launch attends; made once a step."""

    packed: int  # queries × group in a program
    launch: Launch
    tiles: torch.Tensor  # int32 [n, 2] row (-1: nothing to do) and its first query


def plan_prompt(
    rows: Rows, min_queries: int, max_counts: tuple[int, int], heads: tuple[int, int, int], like: torch.Tensor
) -> PromptPlan:
    """Tiles of the rows with at least `min_queries` queries.

    max_counts: such rows, and their queries, that a launch must serve, now or by replay · heads: (query heads, KV
    heads, dim) · like: a tensor of the type of the KV memory, on its device.
    """
    num_heads, num_kv_heads, dim = heads
    group = num_heads // num_kv_heads
    packed = max(128 if dim <= 128 else 64, next_power_of_2(group))
    launch = Launch(64 if dim <= 128 and like.element_size() <= 2 else 32, packed // 16, num_stages=3)
    queries = packed // group
    return PromptPlan(packed, launch, find_tiles(rows, min_queries, queries, max_counts[1] // queries + max_counts[0]))


def find_tiles(rows: Rows, min_queries: int, queries_a_tile: int, max_tiles: int) -> torch.Tensor:
    """PromptPlan.tiles of the rows with at least `min_queries` queries."""
    tiles = rows.starts.new_empty(max_tiles, 2)
    num_rows = len(rows.contexts)
    find_tiles_kernel[(max_tiles,)](tiles, rows.starts, num_rows, min_queries, queries_a_tile, SEARCH, num_warps=4)
    return tiles


def prompt_triton(
    q: torch.Tensor, kv: torch.Tensor, result: torch.Tensor, rows: Rows, plan: PromptPlan, view: View
) -> None:
    """q [T, heads, dim] → the same places of `result`, for the rows of the plan; no others."""
    num_heads, dim = q.shape[1:]
    num_kv_heads, block_size = kv.shape[2:4]
    group = num_heads // num_kv_heads
    assert q.is_contiguous() and result.is_contiguous() and kv.is_contiguous()
    launch = plan.launch
    sizes = (group, dim, next_power_of_2(dim), block_size, plan.packed, launch.tile, view.window or 0)
    pointers = (q, kv, result, plan.tiles, rows.starts, rows.contexts, rows.tables)
    grid = (len(plan.tiles), num_kv_heads)
    counts = (view.scale * LOG2_E, rows.tables.stride(0))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    prompt_kernel[grid](*pointers, *counts, *sizes, **options, **early(q))


@jit("num_rows", "min_queries", "queries_a_tile")
def find_tiles_kernel(
    tiles: tl.tensor,
    starts: tl.tensor,
    num_rows: tl.tensor,
    min_queries: tl.tensor,
    queries_a_tile: tl.tensor,
    SEARCH: tl.constexpr,
) -> None:
    """Program t finds the row in which the t-th tile lies; a row's last tile comes first, since it costs most."""
    tile = tl.program_id(0)
    found_row = -1
    found_query = 0
    before = 0
    for base in tl.range(0, num_rows, SEARCH):
        row = base + tl.arange(0, SEARCH)
        inside = row < num_rows
        lens = tl.load(starts + row + 1, inside, other=0) - tl.load(starts + row, inside, other=0)
        counts = tl.where(lens >= min_queries, tl.cdiv(lens, queries_a_tile), 0)
        ends = before + tl.cumsum(counts, 0)
        holds = (ends > tile) & (ends - counts <= tile)
        found_row += tl.sum(tl.where(holds, row + 1, 0), 0)
        found_query += tl.sum(tl.where(holds, ends - 1 - tile, 0), 0) * queries_a_tile
        before += tl.sum(counts, 0)
    tl.store(tiles + 2 * tile, found_row)
    tl.store(tiles + 2 * tile + 1, found_query)


@jit("stride_table")
def prompt_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    result: tl.tensor,
    tiles: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    scale: tl.tensor,
    stride_table: tl.tensor,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (tile of queries, KV head)."""
    follow(EARLY)
    index, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + 2 * index)
    if row < 0:
        return
    first_query = tl.load(tiles + 2 * index + 1)
    start = tl.load(starts + row).to(tl.int64)
    num_queries = (tl.load(starts + row + 1) - start).to(tl.int32)
    before = tl.load(contexts + row) - num_queries
    packed = tl.arange(0, PACKED)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    query = first_query + packed // GROUP
    token_heads = (start + query) * (tl.num_programs(1) * GROUP) + head * GROUP + packed % GROUP
    # packed rows beyond the last whole query belong to the next tile
    inside = ((query < num_queries) & (packed < PACKED // GROUP * GROUP))[:, None] & (column < DIM)
    queries = tl.load(q + token_heads[:, None] * DIM + column, inside, other=0.0)

    end = before + tl.minimum(first_query + PACKED // GROUP, num_queries)
    total, sums = attend_tiles(
        queries, kv + head * BLOCK_SIZE * DIM, tables + row.to(tl.int64) * stride_table, before + query, end, scale,
        before + first_query, tl.num_programs(1), DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW,
    )  # fmt: skip
    mean = sums / tl.maximum(total, 1e-30)[:, None]
    tl.store(result + token_heads[:, None] * DIM + column, mean.to(result.dtype.element_ty), inside)


@jit()
def attend_tiles(
    queries: tl.tensor,
    keys: tl.tensor,
    table: tl.tensor,
    position: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    first_position: tl.tensor,
    num_kv_heads: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The softmax over positions below `end`: tiles that all queries see, then the masked ones (with a window, all)."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    oldest, whole, tile = 0, (first_position + 1) // TILE, 0
    if WINDOW > 0:
        oldest = tl.maximum(first_position - WINDOW + 1, 0)
        tile = oldest // TILE
        whole = tile
    to_values = num_kv_heads * BLOCK_SIZE * DIM
    place = tile * TILE + tl.arange(0, TILE)
    top = tl.full(position.shape, -1e20, tl.float32)
    total = tl.zeros(position.shape, tl.float32)
    sums = tl.zeros([position.shape[0], BLOCK_DIM], tl.float32)
    ids = load_ids(table, place, (place < end) & (place >= oldest), BLOCK_SIZE)
    for _ in tl.range(tile, whole):
        pointers = keys + (ids.to(tl.int64) * (2 * to_values) + place % BLOCK_SIZE * DIM)[:, None] + column
        k = load_tile(pointers, None, DIM, BLOCK_DIM, "")
        v = load_tile(pointers + to_values, None, DIM, BLOCK_DIM, "")
        place += TILE
        ids = load_ids(table, place, place < end, BLOCK_SIZE)
        top, total, sums = fold(queries, k.to(queries.dtype), v.to(queries.dtype), None, scale, top, total, sums)
    for _ in tl.range(whole, tl.cdiv(end, TILE)):
        read = ((place < end) & (place >= oldest))[:, None]
        pointers = keys + (ids.to(tl.int64) * (2 * to_values) + place % BLOCK_SIZE * DIM)[:, None] + column
        k = load_tile(pointers, read, DIM, BLOCK_DIM, "")
        v = load_tile(pointers + to_values, read, DIM, BLOCK_DIM, "")
        visible = place[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= place[None, :] > position[:, None] - WINDOW
        place += TILE
        ids = load_ids(table, place, (place < end) & (place >= oldest), BLOCK_SIZE)
        top, total, sums = fold(queries, k.to(queries.dtype), v.to(queries.dtype), visible, scale, top, total, sums)
    return total, sums
