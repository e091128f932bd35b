"""Which rows share a prefix: on tables that are made for it, and against the definition on random ones."""

from __future__ import annotations

import numpy as np

from tabstop.kernels.attention import UNIT
from tabstop.worker.sharing import MIN_SHARED, MIN_SHARERS, find_sharing, max_tiles

BLOCK = 16


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
    shared, tiles = found(tables_of(12, (list(range(12)), 13)), [300] * 12)
    assert shared == [13 * BLOCK // UNIT * UNIT] * 12
    assert tiles == [list(range(9)), [9, 10, 11]]


def test_groups_are_told_apart_and_strangers_left_alone() -> None:
    evens, odds = [0, 2, 4, 6], [1, 3, 5, 7, 9]
    shared, tiles = found(tables_of(11, (evens, 8), (odds, 16)), [319] * 11)
    assert shared == [128, 256, 128, 256, 128, 256, 128, 256, 0, 256, 0]
    assert tiles == [odds, evens]


def test_only_what_all_have_stored_is_shared() -> None:
    tables = tables_of(5, (list(range(5)), 20))
    assert found(tables, [320, 319, 200, 310, 300])[0] == [192] * 5
    assert found(tables, [320, 319, MIN_SHARED - 1, 310, 300])[0] == [256, 256, 0, 256, 256]


def test_prompts_and_small_groups_do_not_share() -> None:
    tables = tables_of(MIN_SHARERS, (list(range(MIN_SHARERS)), 20))
    assert found(tables, [320] * MIN_SHARERS)[1] == [list(range(MIN_SHARERS))]
    assert found(tables, [320] * MIN_SHARERS, [1] * (MIN_SHARERS - 1) + [2]) == ([0] * MIN_SHARERS, [])
    assert found(tables[1:], [320] * (MIN_SHARERS - 1)) == ([0] * (MIN_SHARERS - 1), [])


def test_a_copy_of_an_early_block_ends_what_is_shared() -> None:
    tables = tables_of(6, (list(range(6)), 20))
    tables[3, 1] = 10_000  # computed twice at once: a block of its own with the same content
    assert found(tables, [320] * 6) == ([0] * 6, [])
    tables[3, 1] = tables[0, 1]
    tables[3, 9] = 10_000
    assert found(tables, [320] * 6)[0] == [9 * BLOCK // UNIT * UNIT] * 6


def test_the_largest_groups_come_first_where_tiles_run_out() -> None:
    small, large = [0, 1, 2, 3], [4, 5, 6, 7, 8]
    shared, tiles = found(tables_of(9, (small, 10), (large, 10)), [200] * 9, spare=1)
    assert shared == [0] * 4 + [128] * 5
    assert tiles == [large]


def test_random_tables() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        num_rows, num_blocks = int(random.integers(1, 60)), 24
        tables = np.arange(num_rows * num_blocks, dtype=np.int32).reshape(num_rows, num_blocks)
        for row in range(1, num_rows):
            common = int(random.integers(0, num_blocks))
            tables[row, :common] = tables[random.integers(0, row), :common]
        starts = random.integers(0, num_blocks * BLOCK, num_rows)
        lens = random.integers(1, 3, num_rows)
        shared, tiles = found(tables, starts.tolist(), lens.tolist(), width=int(random.integers(4, 20)))
        held = [row for tile in tiles for row in tile]
        assert sorted(held) == [row for row in range(num_rows) if shared[row]]
        assert all(lens[row] == 1 and shared[row] <= starts[row] and shared[row] % UNIT == 0 for row in held)
        for tile in tiles:
            blocks = shared[tile[0]] // BLOCK
            assert {shared[row] for row in tile} == {shared[tile[0]]}
            assert (tables[tile, :blocks] == tables[tile[0], :blocks]).all()
