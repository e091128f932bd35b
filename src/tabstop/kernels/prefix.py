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
from tabstop.kernels.language import early, follow, jit, next_power_of_2, tl

PACKED, PACKED_WIDE = 64, 16  # rows of a program's tile (sharing rows × group); of float32, which fills registers
MIN_WIDTH = 4  # sharing rows of a tile, below which nothing is won
MIN_ROWS = 16  # of a launch
MAX_SPLITS = 8
MIN_TILES = 4  # of a split


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """A launch's counts, and what it leaves for each row; made once a step."""

    sharing: Sharing
    packed: int
    num_splits: int  # at most
    min_tiles: int  # of a split: a short prefix has fewer splits
    launch: Launch
    partial: torch.Tensor  # float32 [splits, R, heads, dim]
    weights: torch.Tensor  # float32 [splits, R, heads]: log2 of the sum of exponentials

    @property
    def found(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """What the decoding kernel begins with."""
        return self.sharing.lens, self.partial, self.weights, self.num_splits, self.min_tiles


NOTHING_FOUND = (None, None, None, 1, 1)
"""PrefixPlan.found where there is no plan."""


def width_of(group: int, dtype: torch.dtype) -> int:
    """Rows that a tile attends at once, where so many heads share a KV head; 0: too few to be worth it."""
    width = packed_of(dtype) // group
    return width if width >= MIN_WIDTH else 0


def packed_of(dtype: torch.dtype) -> int:
    return PACKED if dtype.itemsize <= 2 else PACKED_WIDE


def plan_prefix(sharing: Sharing, heads: tuple[int, int, int], like: torch.Tensor) -> PrefixPlan | None:
    """heads: (query heads, KV heads, dim) · like: a tensor of the type of the KV memory, on its device.

    None where a launch has so few rows that its own cost is more than what it could save.
    """
    num_heads, _, dim = heads
    num_rows = len(sharing.lens)
    if num_rows < MIN_ROWS:
        return None
    # Few rows of many may share something long: splits must not be counted by the rows. What they leave takes memory.
    num_splits = MAX_SPLITS if num_rows <= 256 else MAX_SPLITS // 2
    launch = Launch(UNIT, num_warps=4, num_stages=max(1, min(3, 768 // (dim * like.element_size()))))
    partial = like.new_empty(num_splits, num_rows, num_heads, dim, dtype=torch.float32)
    weights = partial.new_empty(partial.shape[:3])
    return PrefixPlan(sharing, packed_of(like.dtype), num_splits, MIN_TILES, launch, partial, weights)


def prefix_triton(q: torch.Tensor, kv: torch.Tensor, rows: Rows, plan: PrefixPlan, scale: float) -> None:
    """q [T, heads, dim] of rows with one query → plan.partial and plan.weights, of rows in tiles; no others."""
    num_heads, dim = q.shape[1:]
    num_kv_heads, block_size = kv.shape[2:4]
    group, tiles, launch = num_heads // num_kv_heads, plan.sharing.tiles, plan.launch
    assert tiles.is_contiguous() and tiles.shape[1] * group <= plan.packed
    assert launch.tile == UNIT, "the decoding kernel counts splits by it"
    pointers = (q, kv, plan.partial, plan.weights, plan.sharing.lens, tiles, rows.starts, rows.tables)
    grid = (num_kv_heads, len(tiles), plan.num_splits)
    counts = (scale * LOG2_E, rows.tables.stride(0), len(rows.contexts), plan.min_tiles)
    sizes = (tiles.shape[1], group, dim, next_power_of_2(dim), block_size, plan.packed, launch.tile)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    prefix_kernel[grid](*pointers, *counts, *sizes, **options, **early(q))


@jit("stride_table", "num_rows", "min_tiles")
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
    min_tiles: tl.tensor,
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
    num_tiles = tl.load(lens + leader) // TILE
    share = tiles_a_split(num_tiles, tl.num_programs(2), min_tiles)
    begin, end = split * share, tl.minimum(split * share + share, num_tiles)
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
def tiles_a_split(num_tiles: tl.tensor, num_splits: tl.tensor, min_tiles: tl.tensor) -> tl.tensor:
    """Of a prefix; the last split may have fewer, and there may be fewer splits."""
    return tl.maximum(tl.cdiv(num_tiles, num_splits), min_tiles)


@jit()
def num_splits_of(num_tiles: tl.tensor, num_splits: tl.tensor, min_tiles: tl.tensor) -> tl.tensor:
    """Those of a prefix that have tiles."""
    return tl.cdiv(num_tiles, tiles_a_split(num_tiles, num_splits, min_tiles))


@jit()
def start_softmax(
    partial: tl.tensor,
    weights: tl.tensor,
    row_head: tl.tensor,
    stride_split: tl.tensor,
    num_splits: tl.tensor,
    inside: tl.tensor,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state (as `fold` has it) after the first `num_splits` splits of the prefix; 0, or no `partial`: that of the
    beginning, which without matrices (PACKED 1) each of a tile's places has for itself.

    row_head [PACKED]: index in a split of `weights` · inside [PACKED, 1].
    """
    lanes: tl.constexpr = TILE if PACKED == 1 else PACKED
    top = tl.full([lanes], -1e20, tl.float32)
    total = tl.zeros([lanes], tl.float32)
    sums = tl.zeros([lanes, BLOCK_DIM], tl.float32)
    if partial is not None:
        column = tl.arange(0, BLOCK_DIM)[None, :]
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
