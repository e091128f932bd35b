"""Attention of many rows over a prefix that they share, read once for a tile of rows: cascade attention.

Rows whose block tables begin with the same blocks (one system prompt, one file) would each read the same keys and
values. Here a tile of such rows attends their prefix as one matrix (Juravsky et al., "Hydragen", 2024; Zheng et al.,
"SGLang", 2024, share it likewise); what it finds is where the decoding kernel begins each row's softmax. Which rows
share what is read on the device, so a CUDA graph may replay a launch with any rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tabstop.kernels.attention import LOG2_E, UNIT, Launch, Rows, Sharing, fold, load_ids, load_tile
from tabstop.kernels.language import ceil_div, early, follow, jit, next_power_of_2, tl

PACKED = 64  # rows of a program's tile: sharing rows × group
MIN_WIDTH = 4  # sharing rows of a tile, below which nothing is won
MIN_ROWS = 16  # of a launch
ENOUGH_PROGRAMS = 132
MAX_SPLITS = 8


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """A launch's counts, and what it leaves for each row; made once a step."""

    sharing: Sharing
    num_splits: int
    launch: Launch
    partial: torch.Tensor  # float32 [splits, R, heads, dim]
    weights: torch.Tensor  # float32 [splits, R, heads]: log2 of the sum of exponentials

    @property
    def found(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What the decoding kernel begins with."""
        return self.sharing.lens, self.partial, self.weights, self.num_splits


def width_of(group: int) -> int:
    """Rows that a tile attends at once, where so many heads share a KV head; 0: too few to be worth it."""
    return PACKED // group if PACKED // group >= MIN_WIDTH else 0


def plan_prefix(sharing: Sharing, heads: tuple[int, int, int], like: torch.Tensor) -> PrefixPlan | None:
    """heads: (query heads, KV heads, dim) · like: a tensor of the type of the KV memory, on its device.

    None where a launch has so few rows that its own cost is more than what it could save.
    """
    num_heads, num_kv_heads, dim = heads
    num_rows = len(sharing.lens)
    if num_rows < MIN_ROWS:
        return None
    full_tiles = ceil_div(num_rows, sharing.tiles.shape[1])
    num_splits = min(ceil_div(ENOUGH_PROGRAMS, full_tiles * num_kv_heads), MAX_SPLITS)
    launch = Launch(UNIT, num_warps=4, num_stages=max(1, min(3, 768 // (dim * like.element_size()))))
    partial = like.new_empty(num_splits, num_rows, num_heads, dim, dtype=torch.float32)
    return PrefixPlan(sharing, num_splits, launch, partial, partial.new_empty(partial.shape[:3]))


def prefix_triton(q: torch.Tensor, kv: torch.Tensor, rows: Rows, plan: PrefixPlan, scale: float) -> None:
    """q [T, heads, dim] of rows with one query → plan.partial and plan.weights, of rows in tiles; no others."""
    num_heads, dim = q.shape[1:]
    num_kv_heads, block_size = kv.shape[2:4]
    group, tiles, launch = num_heads // num_kv_heads, plan.sharing.tiles, plan.launch
    assert tiles.is_contiguous() and tiles.shape[1] * group <= PACKED
    pointers = (q, kv, plan.partial, plan.weights, plan.sharing.lens, tiles, rows.starts, rows.tables)
    grid = (num_kv_heads, len(tiles), plan.num_splits)
    counts = (scale * LOG2_E, rows.tables.stride(0), len(rows.contexts))
    sizes = (tiles.shape[1], group, dim, next_power_of_2(dim), block_size, PACKED, launch.tile)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    prefix_kernel[grid](*pointers, *counts, *sizes, **options, **early(q))


@jit("stride_table", "num_rows")
def prefix_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    partial: tl.tensor,
    weights: tl.tensor,
    lens: tl.tensor,
    tiles: tl.tensor,
    starts: tl.tensor,
    tables: tl.tensor,
    scale: tl.tensor,
    stride_table: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Program (KV head, tile of rows, split of their prefix)."""
    follow(EARLY)
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    leader = tl.load(tiles + tile * WIDTH)
    if leader < 0:
        return
    begin, end = split_of_prefix(tl.load(lens + leader), split, tl.num_programs(2), TILE)
    if begin >= end:
        return
    packed = tl.arange(0, PACKED)
    column = tl.arange(0, BLOCK_DIM)[None, :]
    row = tl.load(tiles + tile * WIDTH + packed // GROUP, packed < WIDTH * GROUP, other=-1)
    inside = (row >= 0)[:, None] & (column < DIM)
    num_heads = tl.num_programs(0) * GROUP
    own_head = head * GROUP + packed % GROUP
    token_heads = tl.load(starts + row, row >= 0, other=0).to(tl.int64) * num_heads + own_head
    queries = tl.load(q + token_heads[:, None] * DIM + column, inside, other=0.0)

    table = tables + leader.to(tl.int64) * stride_table
    to_values = tl.num_programs(0) * BLOCK_SIZE * DIM
    keys = kv + head * BLOCK_SIZE * DIM
    place = begin * TILE + tl.arange(0, TILE)
    top = tl.full([PACKED], -1e20, tl.float32)
    total = tl.zeros([PACKED], tl.float32)
    sums = tl.zeros([PACKED, BLOCK_DIM], tl.float32)
    ids = load_ids(table, place, place < end * TILE, BLOCK_SIZE)
    for _ in tl.range(begin, end):
        pointers = keys + (ids.to(tl.int64) * (2 * to_values) + place % BLOCK_SIZE * DIM)[:, None] + column
        k = load_tile(pointers, None, DIM, BLOCK_DIM, "")
        v = load_tile(pointers + to_values, None, DIM, BLOCK_DIM, "")
        place += TILE
        ids = load_ids(table, place, place < end * TILE, BLOCK_SIZE)
        top, total, sums = fold(queries, k.to(queries.dtype), v.to(queries.dtype), None, scale, top, total, sums)
    target = (split.to(tl.int64) * num_rows + row) * num_heads + own_head
    tl.store(partial + target[:, None] * DIM + column, sums / total[:, None], inside)
    tl.store(weights + target, top + tl.log2(total), row >= 0)


@jit()
def split_of_prefix(
    length: tl.tensor, split: tl.tensor, num_splits: tl.tensor, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(first tile, end of tiles) of a split; none where there are fewer tiles than splits."""
    num_tiles = length // TILE
    share = tl.cdiv(num_tiles, num_splits)
    return split * share, tl.minimum(split * share + share, num_tiles)


@jit()
def num_splits_of_prefix(length: tl.tensor, num_splits: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """Those that have tiles."""
    num_tiles = length // TILE
    return tl.cdiv(num_tiles, tl.maximum(tl.cdiv(num_tiles, num_splits), 1))


@jit()
def softmax_of_prefix(
    partial: tl.tensor,
    weights: tl.tensor,
    row_head: tl.tensor,
    stride_split: tl.tensor,
    num_splits: tl.tensor,
    inside: tl.tensor,
    PACKED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state (as `fold` has it) after the first `num_splits` splits of the prefix; 0: that of the beginning.

    row_head [PACKED]: index in a split of `weights` · inside [PACKED, 1].
    """
    column = tl.arange(0, BLOCK_DIM)[None, :]
    top = tl.full([PACKED], -1e20, tl.float32)
    total = tl.zeros([PACKED], tl.float32)
    sums = tl.zeros([PACKED, BLOCK_DIM], tl.float32)
    for split in tl.range(0, num_splits):
        place = split * stride_split + row_head
        found = tl.max(tl.load(weights + place[:, None], inside, other=-1e20), 1)
        mean = tl.load(partial + place.to(tl.int64)[:, None] * DIM + column, inside & (column < DIM), other=0.0)
        new_top = tl.maximum(top, found)
        share, shrink = tl.exp2(found - new_top), tl.exp2(top - new_top)
        total = total * shrink + share
        sums = sums * shrink[:, None] + share[:, None] * mean
        top = new_top
    return top, total, sums
