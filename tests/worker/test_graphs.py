"""Which steps a graph serves: the sizes alone, no card."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tabstop.engine.mix import RIDGE
from tabstop.worker.graphs import MIXED, mixed_sizes


@pytest.mark.parametrize(
    ("num_tokens", "max_num_seqs"), [(2048, 1024), (2048, 2048), (512, 64), (40, 16), (7, 7), (9000, 5)]
)
def test_every_step_with_prompts_fits_a_graph(num_tokens, max_num_seqs):
    sizes = set(mixed_sizes(num_tokens, max_num_seqs))
    largest = min(num_tokens, MIXED[-1])
    assert max(sizes) == (largest, min(largest, max_num_seqs)), "whoever is captured first has the most rows"
    assert all(rows <= tokens and rows <= max_num_seqs for tokens, rows in sizes)
    for tokens in range(2, largest + 1, max(1, largest // 50)):
        for rows in {1, tokens // 3, min(tokens - 1, max_num_seqs)} - {0}:
            if rows <= max_num_seqs:
                assert any(size[0] >= tokens and size[1] >= rows for size in sizes)


@pytest.mark.parametrize("num_rows", [8, 64, 120, 256, 300, 500])
def test_a_chunk_beside_streams_costs_little_padding(num_rows):
    tokens = sorted({tokens for tokens, _ in mixed_sizes(2048, 1024)})
    num_tokens = 2 * max(RIDGE, num_rows)
    assert next(size for size in tokens if size >= num_tokens) <= 1.12 * num_tokens


def test_logits_are_padded_by_half_at_most_where_they_are_many():
    rows = sorted(rows for tokens, rows in mixed_sizes(2048, 1024) if tokens == 2048)
    assert all(more <= 2 * less for less, more in pairwise(rows[1:])) and rows[-1] == 1024
