"""Which rows of a step begin with the same blocks, so that attention may read those once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tabstop.kernels.attention import UNIT

DEPTHS = tuple(128 << n for n in reversed(range(11)))
"""Positions at which rows are looked at: those that share much are found before those that share less, to whom they
would also belong. A prefix shorter than the last is not worth a launch's work."""

MIN_SHARERS = 4
"""Rows, below which nothing is won."""

SPARE_TILES = 8
"""Tiles beside those that all rows fill: groups leave their last tile partly empty."""


def max_tiles(num_rows: int, width: int) -> int:
    """Tiles that a step of so many rows may have."""
    return -(-num_rows // width) + SPARE_TILES


def find_sharing(tables: np.ndarray, stored: np.ndarray, block_size: int, lens: np.ndarray, tiles: np.ndarray) -> None:
    """Fills `lens` and `tiles` as kernels.attention.Sharing has them; beyond R rows nobody shares.

    tables int32 [R, blocks] · stored int [R]: tokens in them before this step, 0 for rows that shall not share. Rows
    have a block in common only if all before it is the same, too (cache/blocks.py), so one block tells of a prefix.
    Where tiles run out, small groups that share little go without.
    """
    lens.fill(0)
    tiles.fill(-1)
    left = np.flatnonzero(stored >= DEPTHS[-1])
    if not any(True for _ in _groups(tables, left, _column(DEPTHS[-1], block_size))):
        return
    num_used, width = 0, tiles.shape[1]
    for depth in DEPTHS:
        for members in _groups(tables, left[stored[left] >= depth], _column(depth, block_size)):
            taken = members[: (len(tiles) - num_used) * width]
            if len(taken) > width and len(taken) % width < MIN_SHARERS:
                taken = taken[: len(taken) // width * width]  # a tile for the rest would cost more than it saves
            lens[taken] = _common_length(tables, taken, (depth, int(stored[taken].min())), block_size)
            num_tiles = -(-len(taken) // width)
            tiles[num_used : num_used + num_tiles].reshape(-1)[: len(taken)] = taken
            num_used += num_tiles
            if num_used == len(tiles):
                return
        left = left[lens[left] == 0]


def _column(length: int, block_size: int) -> int:
    """That of the block in which a prefix of this length ends."""
    return (length - 1) // block_size


def _groups(tables: np.ndarray, rows: np.ndarray, column: int) -> Iterator[np.ndarray]:
    """Those of the rows that have one block there, MIN_SHARERS or more, the largest group first; rows in order."""
    if len(rows) < MIN_SHARERS:
        return
    blocks = tables[rows, column]
    order = np.argsort(blocks, kind="stable")
    blocks, rows = blocks[order], rows[order]
    starts = np.flatnonzero(np.diff(blocks, prepend=blocks[0] - 1))
    sizes = np.diff(starts, append=len(rows))
    for group in np.argsort(-sizes, kind="stable").tolist():
        if sizes[group] < MIN_SHARERS:
            return
        yield rows[starts[group] : starts[group] + sizes[group]]


def _common_length(tables: np.ndarray, rows: np.ndarray, bounds: tuple[int, int], block_size: int) -> int:
    """Positions, a multiple of UNIT, that all rows have in common: within the bounds."""
    first, last = (_column(bound, block_size) for bound in bounds)
    while first < last:  # the last column in which all have one block
        middle = (first + last + 1) // 2
        blocks = tables[rows, middle]
        first, last = (middle, last) if (blocks == blocks[0]).all() else (first, middle - 1)
    return min((first + 1) * block_size, bounds[1]) // UNIT * UNIT
