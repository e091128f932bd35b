"""Each metric on records whose answer can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from tabstop.bench import metrics
from tabstop.bench.gate import GateLimits, equal_work
from tabstop.bench.records import Chunk, Record


def record(**changes: object) -> Record:
    """Sent 0.5 s late; chunks of 1, 4 and 2 tokens at 2, 3 and 4 s; the end at 4.25 s."""
    values: dict[str, object] = {
        "session": 0,
        "intended": 1.0,
        "sent": 1.5,
        "ended": 4.25,
        "chunks": [Chunk(2.0, 1, 2), Chunk(3.0, 4, 8), Chunk(4.0, 2, 4)],
        "finish_reason": "length",
        "max_tokens": 7,
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "counted_tokens": 7,
    }
    return Record(**values | changes)  # type: ignore[arg-type]


def test_latencies_on_both_clocks() -> None:
    assert metrics.ttft(record()) == 1.0 and metrics.ttft(record(), from_sent=True) == 0.5
    assert metrics.e2e(record()) == 3.25 and metrics.e2e(record(), from_sent=True) == 2.75
    assert record().lag == 0.5


def test_gaps_are_per_token_not_per_chunk() -> None:
    assert metrics.token_gaps(record()).tolist() == [0.25] * 4 + [0.5] * 2
    assert metrics.tpot(record()) == pytest.approx(2 / 6)


def test_a_chunk_without_a_token_passes_its_time_on() -> None:
    held_back = [Chunk(2.0, 1, 1), Chunk(2.5, 0, 0), Chunk(3.0, 1, 1)]
    assert metrics.token_gaps(record(chunks=held_back)).tolist() == [1.0]


def test_an_answer_of_one_chunk_has_no_time_per_token() -> None:
    assert metrics.tpot(record(chunks=[Chunk(2.0, 5, 10)])) is None


def test_failures_are_infinite_and_the_clients_own_cancellations_are_left_out() -> None:
    failed, hung_up = record(outcome="timeout"), record(outcome="superseded")
    assert metrics.ttft(failed) == metrics.e2e(failed) == math.inf
    samples = metrics.latency_samples([record(), failed, hung_up], from_sent=False)
    assert sorted(samples["e2e"].tolist()) == [3.25, math.inf]


def test_percentiles_that_failures_reach_have_no_value_in_the_report() -> None:
    records = [record(outcome="error" if i % 2 else "ok") for i in range(60)]
    estimate = metrics.summarize(records).latencies["e2e"].percentiles["p90"]
    assert estimate.value is None and "failures" in estimate.note


def test_goodput_counts_over_all_that_was_sent() -> None:
    records = [record(), record(outcome="error"), record(ended=30.0), record(outcome="cancelled")]
    summary = metrics.summarize(records, metrics.Slo(e2e=4.0))
    assert summary.attainment is not None and summary.attainment.value == pytest.approx(1 / 3)


def test_slo_limits_each_latency() -> None:
    for limits, expected in (
        (metrics.Slo(ttft=1.0, tpot=0.34, e2e=3.25, itl_max=0.5), True),
        (metrics.Slo(ttft=0.99), False),
        (metrics.Slo(tpot=0.33), False),
        (metrics.Slo(itl_max=0.4), False),
    ):
        assert metrics.meets(record(), limits) is expected


def test_steady_window_ends_at_the_last_send() -> None:
    records = [record(intended=float(i), sent=float(i), ended=i + 2.0) for i in range(100)]
    window = metrics.steady_window(records, warm_up=10.0)
    assert (window.start, window.end, window.note) == (10.0, 99.0, "")
    assert metrics.mean_concurrency(records, window) == pytest.approx(2.0, rel=0.02)


def test_a_burst_has_no_steady_state_and_says_so() -> None:
    window = metrics.steady_window([record(intended=0.0, sent=0.0) for _ in range(50)])
    assert "no steady state" in window.note and window.end == 4.25


def test_the_account_counts_disagreements() -> None:
    tokens = metrics.account(
        [
            record(),
            record(counted_tokens=6),
            record(expected_prompt_tokens=101),
            record(completion_tokens=9, counted_tokens=9),
            record(retokenized_tokens=8),
        ]
    )
    assert tokens.num_output_mismatches == 1
    assert tokens.num_prompt_mismatches == 1
    assert tokens.num_unlimited == 1
    assert tokens.num_retokenized_mismatches == 1
    assert tokens.output_by_server == 7 * 4 + 9


def failed_checks(candidate: list[Record], limits: GateLimits | None = None) -> set[str]:
    baseline = [record(cached_tokens=0, digest="a") for _ in range(100)]
    return {check.name for check in equal_work(baseline, candidate, limits) if not check.passed}


def test_equal_work_passes_the_gate() -> None:
    assert failed_checks([record(cached_tokens=0, digest="a") for _ in range(100)]) == set()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("output tokens", {"completion_tokens": 6}),
        ("prompt tokens", {"prompt_tokens": 102}),
        ("finish reasons", {"finish_reason": "stop"}),
        ("cache hits", {"cached_tokens": 50}),
        ("max_tokens kept", {"max_tokens": 6}),
    ],
)
def test_unequal_work_is_named(name: str, changes: dict[str, object]) -> None:
    assert failed_checks([record(**{"cached_tokens": 0} | changes) for _ in range(100)]) == {name}


def test_one_failure_in_a_hundred_stops_the_comparison() -> None:
    one_failed = [record(cached_tokens=0, outcome="error" if i == 0 else "ok") for i in range(100)]
    assert "errors of the candidate" in failed_checks(one_failed)


def test_the_dialects_words_for_the_same_end_are_equal() -> None:
    baseline = [record(finish_reason="stop")] * 50
    candidate = [record(finish_reason="eos_token")] * 50
    assert all(check.passed for check in equal_work(baseline, candidate))


def test_different_greedy_answers_can_be_forbidden() -> None:
    different = [record(cached_tokens=0, digest="b") for _ in range(100)]
    assert failed_checks(different, GateLimits(unequal_greedy_answers=0.1)) == {"greedy answers"}
