"""Which rows of a step begin with the same blocks, so that attention may read those once for all of them."""

from __future__ import annotations

import numpy as np

from tabstop.kernels.attention import UNIT

MIN_SHARED = 128
"""Positions, below which a prefix is not worth a launch's work."""

MIN_SHARERS = 4
"""Rows, likewise."""

SPARE_TILES = 8
"""Tiles beside those that all rows fill: groups leave their last tile partly empty."""


def max_tiles(num_rows: int, width: int) -> int:
    """Tiles that a step of so many rows may have."""
    return -(-num_rows // width) + SPARE_TILES


def find_sharing(
    tables: np.ndarray, stored: np.ndarray, block_size: int, shared: np.ndarray, tiles: np.ndarray
) -> None:
    """Fills `shared` and `tiles` as kernels.attention.Sharing has them; what they have beyond R rows says nothing.

    tables int32 [R, blocks] · stored int [R]: tokens in them before this step, 0 for rows that shall not share. Rows
    are grouped by the block that ends the shortest prefix worth sharing; what a group shares is what all of it share,
    and large groups come first where tiles run out.
    """
    shared.fill(0)
    tiles.fill(-1)
    rows = np.flatnonzero(stored >= MIN_SHARED)
    if len(rows) < MIN_SHARERS:
        return
    ends = tables[rows, -(-MIN_SHARED // block_size) - 1]
    _, group_of, counts = np.unique(ends, return_inverse=True, return_counts=True)
    num_used, width = 0, tiles.shape[1]
    for group in np.argsort(-counts, kind="stable").tolist():
        if counts[group] < MIN_SHARERS:
            return
        members = rows[group_of == group]
        length = _shared_length(tables[members], int(stored[members].min()), block_size)
        num_tiles = -(-len(members) // width)
        if length < MIN_SHARED or num_used + num_tiles > len(tiles):
            continue
        shared[members] = length
        tiles[num_used : num_used + num_tiles].reshape(-1)[: len(members)] = members
        num_used += num_tiles


def _shared_length(tables: np.ndarray, shortest: int, block_size: int) -> int:
    """Positions, a multiple of UNIT and at most `shortest`, in the blocks that all tables begin with."""
    same = (tables[:, : shortest // block_size] == tables[0, : shortest // block_size]).all(0)
    num_blocks = len(same) if same.all() else int(same.argmin())
    return num_blocks * block_size // UNIT * UNIT
