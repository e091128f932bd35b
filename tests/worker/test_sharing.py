"""Which rows share a prefix: on tables that are made for it, and against the definition on random ones."""

from __future__ import annotations

import numpy as np
import pytest

from tabstop.kernels.attention import UNIT
from tabstop.worker.sharing import DEPTHS, MIN_SHARERS, find_sharing, max_tiles

BLOCK = 16
SHORTEST = DEPTHS[-1]


def found(
    tables: np.ndarray, starts: list[int], lens: list[int] | None = None, width: int = 9, spare: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """(positions shared by each row, rows of each tile that is used)."""
    num_rows = len(tables)
    shared = np.full(num_rows + 2, 77, np.int32)
    tiles = np.full((max_tiles(num_rows, width) if spare is None else spare, width), 77, np.int32)
    find_sharing(tables, np.where(np.array(lens or [1] * num_rows) == 1, starts, 0), BLOCK, shared, tiles)
    assert shared[num_rows:].tolist() == [0, 0]
    used = [[row for row in tile if row >= 0] for tile in tiles.tolist()]
    assert all(tile[len(rows) :].max(initial=-1) == -1 for tile, rows in zip(tiles, used, strict=True))
    return shared[:num_rows].tolist(), [rows for rows in used if rows]


def tables_of(num_rows: int, *groups: tuple[list[int], int], num_blocks: int = 20) -> np.ndarray:
    """Blocks of their own for all rows, but for groups of rows that have their first so many blocks in common."""
    tables = np.arange(num_rows * num_blocks, dtype=np.int32).reshape(num_rows, num_blocks)
    for rows, common in groups:
        tables[rows, :common] = tables[rows[0], :common]
    return tables


def test_rows_with_one_prompt_share_it() -> None:
    shared, tiles = found(tables_of(13, (list(range(13)), 13)), [300] * 13)
    assert shared == [13 * BLOCK // UNIT * UNIT] * 13
    assert tiles == [list(range(9)), [9, 10, 11, 12]]


def test_groups_are_told_apart_and_strangers_left_alone() -> None:
    evens, odds = [0, 2, 4, 6], [1, 3, 5, 7, 9]
    shared, tiles = found(tables_of(11, (evens, 8), (odds, 16)), [319] * 11)
    assert shared == [128, 256, 128, 256, 128, 256, 128, 256, 0, 256, 0]
    assert tiles == [odds, evens]


def test_only_what_all_have_stored_is_shared() -> None:
    tables = tables_of(5, (list(range(5)), 20))
    assert found(tables, [250, 200, 255, 230, 240])[0] == [192] * 5
    assert found(tables, [250, 255, SHORTEST - 1, 249, 251])[0] == [192, 192, 0, 192, 192]


def test_who_shares_little_takes_nothing_from_those_who_share_much() -> None:
    tables = tables_of(12, (list(range(12)), 20))
    tables[4:8, 9:] += 5_000  # all have a system prompt in common, the first four and the last a file each
    tables[8:, 9:] = tables[8, 9:] + 9_000
    shared, tiles = found(tables, [320] * 4 + [150, 160, 170, 180] + [319] * 4)
    assert shared == [320] * 4 + [128] * 4 + [256] * 4
    assert sorted(tiles) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_prompts_and_small_groups_do_not_share() -> None:
    tables = tables_of(MIN_SHARERS, (list(range(MIN_SHARERS)), 20))
    assert found(tables, [320] * MIN_SHARERS)[1] == [list(range(MIN_SHARERS))]
    assert found(tables, [320] * MIN_SHARERS, [1] * (MIN_SHARERS - 1) + [2]) == ([0] * MIN_SHARERS, [])
    assert found(tables[1:], [320] * (MIN_SHARERS - 1)) == ([0] * (MIN_SHARERS - 1), [])


def test_a_tile_for_few_is_not_worth_it() -> None:
    shared, tiles = found(tables_of(11, (list(range(11)), 20)), [319] * 11)
    assert shared == [256] * 9 + [0, 0] and tiles == [list(range(9))]


def test_the_largest_groups_come_first_where_tiles_run_out() -> None:
    small, large = [0, 1, 2, 3], [4, 5, 6, 7, 8]
    shared, tiles = found(tables_of(9, (small, 10), (large, 10)), [200] * 9, spare=1)
    assert shared == [0] * 4 + [128] * 5
    assert tiles == [large]
    shared, tiles = found(tables_of(12, (list(range(12)), 10)), [200] * 12, spare=1)
    assert shared == [128] * 9 + [0] * 3 and tiles == [list(range(9))]


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 256])
def test_random_trees_of_prefixes(block_size: int) -> None:
    random = np.random.default_rng(block_size)
    num_blocks = max(2, 400 // block_size)
    for _ in range(60):
        num_rows, width = int(random.integers(1, 60)), int(random.integers(4, 20))
        tables = np.arange(num_rows * num_blocks, dtype=np.int32).reshape(num_rows, num_blocks)
        for row in range(1, num_rows):
            common = int(random.integers(0, num_blocks))
            tables[row, :common] = tables[random.integers(0, row), :common]
        stored = random.integers(0, num_blocks * block_size, num_rows)
        lens, tiles = np.empty(num_rows, np.int32), np.empty((max_tiles(num_rows, width), width), np.int32)
        find_sharing(tables, stored, block_size, lens, tiles)
        held = tiles[tiles >= 0].tolist()
        assert sorted(held) == np.flatnonzero(lens).tolist()
        assert (lens % UNIT == 0).all() and (lens[held] >= SHORTEST).all() and (lens <= stored).all()
        for tile in (tile[tile >= 0] for tile in tiles):
            blocks = -(-int(lens[tile].max(initial=0)) // block_size)
            assert len({*lens[tile].tolist()}) <= 1
            assert (tables[tile, :blocks] == tables[tile[:1], :blocks]).all()
