"""Tokens per chunk from every source, and arrival schedules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tabstop.bench.arrivals import arrivals, coefficient_of_variation, dispersion
from tabstop.bench.golden import WORDS, count_words, golden_tokenizer
from tabstop.bench.records import Chunk, Record
from tabstop.bench.tokens import LocalTokenizer, resolve
from tabstop.errors import ConfigError, InputError

TOKENIZER = LocalTokenizer(golden_tokenizer())


def record(text: str, chunks: list[tuple[int, int]], completion_tokens: int | None = None) -> Record:
    stamped = [Chunk(float(i), tokens, chars) for i, (tokens, chars) in enumerate(chunks)]
    values = {"session": 0, "intended": 0.0, "sent": 0.0, "ended": 9.0}
    return Record(**values, text=text, chunks=stamped, completion_tokens=completion_tokens)  # type: ignore[arg-type]


def counts(record: Record) -> list[int]:
    return [chunk.num_tokens for chunk in record.chunks]


def test_the_servers_own_count_comes_first() -> None:
    resolved = resolve(record(" def x", [(1, 4), (1, 2)], 2), TOKENIZER)
    assert (counts(resolved), resolved.count_source, resolved.retokenized_tokens) == ([1, 1], "server", 2)


def test_unknown_chunks_are_empty_when_the_known_ones_make_up_the_total() -> None:
    resolved = resolve(record(" return", [(-1, 3), (1, 4)], 1))
    assert (counts(resolved), resolved.count_source) == ([0, 1], "server")


def test_a_local_tokenizer_counts_a_token_where_it_ends() -> None:
    resolved = resolve(record(" def return x", [(-1, 6), (-1, 5), (-1, 2)]), TOKENIZER)
    assert (counts(resolved), resolved.count_source) == ([1, 1, 1], "tokenizer")


def test_a_total_is_spread_over_the_chunks() -> None:
    assert resolve(record("abcd", [(-1, 2), (-1, 2)], 2)).count_source == "usage"
    spread = resolve(record("abcdefgh", [(-1, 6), (-1, 2)], 5))
    assert (counts(spread), spread.count_source) == ([4, 1], "apportioned")


def test_without_any_count_a_chunk_is_a_token_and_says_so() -> None:
    assert resolve(record("abc", [(-1, 3), (-1, 0)])).count_source == "chunks"


def test_golden_words_are_one_token_each() -> None:
    text = "".join(WORDS)
    assert TOKENIZER.count(text) == count_words(text) == len(WORDS)
    assert len(TOKENIZER.ends(text)) == len(WORDS)


def test_a_missing_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer at"):
        LocalTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is not a tokenizer"):
        LocalTokenizer.load(tmp_path)


@pytest.mark.parametrize(("process", "variation"), [("constant", 0.0), ("poisson", 1.0), ("gamma", 2.0)])
def test_schedules_have_their_rate_and_burstiness(process: str, variation: float) -> None:
    offsets = arrivals(process, 20.0, 20_000, np.random.default_rng(5), shape=0.25)
    assert np.all(np.diff(offsets) >= 0)
    assert len(offsets) / offsets[-1] == pytest.approx(20.0, rel=0.05)
    assert coefficient_of_variation(offsets) == pytest.approx(variation, abs=0.1)


def test_poisson_counts_keep_their_variance() -> None:
    rng = np.random.default_rng(6)
    ends = [arrivals("poisson", 10.0, 100, rng)[-1] for _ in range(300)]
    assert np.std(ends) == pytest.approx(1.0, rel=0.2)  # sqrt(100) / 10
    assert dispersion(arrivals("poisson", 50.0, 20_000, rng), 1.0) == pytest.approx(1.0, abs=0.2)


def test_bad_schedules_are_refused() -> None:
    rng = np.random.default_rng(0)
    for arguments in (("poisson", 0.0), ("daily", 1.0)):
        with pytest.raises(ConfigError):
            arrivals(*arguments, 3, rng)
    with pytest.raises(ConfigError, match="gamma shape"):
        arrivals("gamma", 1.0, 3, rng, shape=0.0)
