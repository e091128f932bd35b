"""Percentiles, early stopping, Holm and the verdicts of paired blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from tabstop.bench import statistics as st

NUM_METRICS = 8


def test_a_verdict_needs_an_interval_without_one() -> None:
    """Seen with four blocks on a busy machine: Holm's p 0.04, ratio 0.13 [0.05, 2.3]."""
    blocks = st.MetricBlocks("tpot_p50", False, [1.0, 1.1, 1.0, 6.0], [0.1, 0.12, 0.1, 0.9], [], [])
    difference = st.Difference(0.134, 0.051, 2.281, 0.0381, 4)
    judgement = st._judge_one(blocks, difference, 0.0381, 0.05, 0.01)
    assert judgement.verdict == "no difference" and "interval holds 1" in judgement.reason
    clear = msgspec.structs.replace(difference, high=0.6)
    assert st._judge_one(blocks, clear, 0.0381, 0.05, 0.01).verdict == "faster"


def test_percentiles_are_members_of_the_sample_and_survive_infinite_latencies() -> None:
    assert st.percentile([1, 2, 3, 4], 0.5) == 2
    assert st.percentile([1.0] * 98 + [math.inf] * 2, 0.99) == math.inf
    assert st.percentile([1.0] * 99 + [math.inf], 0.99) == 1.0
    with pytest.raises(ValueError, match="nothing"):
        st.percentile([], 0.5)


def test_the_interval_of_p99_has_no_upper_end_under_368_samples() -> None:
    assert st.percentile_ranks(300, 0.99)[1] is None
    estimate = st.estimate_percentile(list(range(300)), 0.99)
    assert estimate.value is None and "needs 368 samples, there are 300" in estimate.note
    assert st.smallest_sample(0.99) == 368
    assert st.estimate_percentile(list(range(368)), 0.99).value is not None


@pytest.mark.parametrize(("num_samples", "low", "high"), [(1000, 0.983, 0.9971), (10_000, 0.988, 0.992)])
def test_the_interval_of_p99_spans_what_the_binomial_says(num_samples: int, low: float, high: float) -> None:
    first, last = st.percentile_ranks(num_samples, 0.99)
    assert first is not None and last is not None
    assert first / num_samples == pytest.approx(low, abs=1e-3)
    assert last / num_samples == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_percentile_intervals_cover_the_truth(q: float) -> None:
    rng, covered, num_repeats = np.random.default_rng(1), 0, 600
    truth = -math.log(1 - q)
    for _ in range(num_repeats):
        estimate = st.estimate_percentile(rng.exponential(size=120), q)
        assert estimate.low is not None and estimate.high is not None
        covered += estimate.low <= truth <= estimate.high
    assert covered / num_repeats >= 0.93


def test_batch_means_are_wider_than_the_independent_interval_on_a_correlated_series() -> None:
    rng = np.random.default_rng(2)
    series = np.zeros(4000)
    for i in range(1, len(series)):
        series[i] = 0.95 * series[i - 1] + rng.normal()
    estimate = st.estimate_mean(series)
    assert estimate.low is not None and estimate.high is not None
    independent = 2 * 1.96 * series.std() / math.sqrt(len(series))
    assert estimate.high - estimate.low > 3 * independent


def test_wilson_interval_stays_within_zero_and_one() -> None:
    estimate = st.wilson(50, 50)
    assert estimate.high == 1.0 and estimate.low is not None and 0.92 < estimate.low < 0.94
    assert st.wilson(0, 0).value is None


@pytest.mark.parametrize(
    ("q", "num_over", "needed"),
    [(0.99, 0, 459), (0.99, 1, 662), (0.99, 2, 838), (0.99, 5, 1307), (0.99, 10, 2010), (0.95, 0, 90), (0.9, 0, 44)],
)
def test_early_stopping_follows_the_binomial(q: float, num_over: int, needed: int) -> None:
    assert st.required_queries(num_over, q) == needed
    assert st.early_decision(needed, num_over, q) is True
    assert st.early_decision(needed - 1, num_over, q) is None


def test_early_stopping_gives_up_when_too_many_are_late() -> None:
    assert st.early_decision(20, 10, 0.99) is False
    assert st.early_decision(0, 0, 0.99) is None


def test_holm_multiplies_by_what_is_left_and_never_decreases() -> None:
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([]) == []


def test_infinite_or_missing_blocks_are_not_comparable() -> None:
    blocks = [1.0] * 8
    with_failures = st.MetricBlocks("e2e", False, blocks, [math.inf, *blocks[1:]])
    too_few = st.MetricBlocks("ttft", False, blocks[:3], blocks[:3])
    assert [j.verdict for j in st.judge([with_failures, too_few], seed=0)] == ["not comparable"] * 2


def test_a_difference_inside_the_noise_floor_or_under_one_percent_is_no_difference() -> None:
    rng = np.random.default_rng(3)
    baseline = np.exp(rng.normal(0, 0.001, 10))
    noisy = list(np.exp(rng.normal(0, 0.3, 10)))
    quiet = list(np.exp(rng.normal(0, 0.001, 10)))

    def verdict(factor: float, aa: list[float]) -> st.Judgement:
        candidate = list(baseline * factor * np.exp(rng.normal(0, 0.001, 10)))
        return st.judge([st.MetricBlocks("ttft", False, list(baseline), candidate, aa, quiet)], seed=1)[0]

    assert verdict(1.05, quiet).verdict == "slower"
    assert verdict(0.95, quiet).verdict == "faster"
    assert "noise floor" in verdict(1.05, noisy).reason
    assert "smaller than 1 %" in verdict(1.005, quiet).reason


def _synthetic(rng: np.random.Generator, length: int) -> st.Floats:
    """Correlated machine noise with a drift of about 10 %, one column a metric. shape: (length, NUM_METRICS)"""
    time = np.linspace(0, 1, length)
    drift = 0.1 * np.sin(2 * np.pi * (time * rng.uniform(0.5, 3) + rng.uniform())) + 0.1 * rng.normal() * time
    shared = np.zeros(length)
    for i in range(1, length):
        shared[i] = 0.9 * shared[i - 1] + 0.02 * rng.normal()
    return np.exp((drift + shared)[:, None] + 0.03 * rng.normal(size=(length, NUM_METRICS)))


Noise = Callable[[np.random.Generator, int], st.Floats]


def count_verdicts(noise: Noise, slow_down: float, num_blocks: int = 10, num_repeats: int = 200) -> list[int]:
    """How often each metric is called different, when the candidate is `slow_down` times slower."""
    found: list[int] = []
    for repeat in range(num_repeats):
        rng = np.random.default_rng(repeat)
        segments = noise(rng, 4 * (num_blocks + num_blocks // 2))
        baseline, candidate = [], []
        for block in np.split(segments, len(segments) // 4):
            is_candidate = np.array([0, 1, 1, 0] if rng.random() < 0.5 else [1, 0, 0, 1], dtype=bool)
            baseline.append(block[~is_candidate].mean(axis=0))
            candidate.append(block[is_candidate].mean(axis=0))
        first, second = np.array(baseline).T, np.array(candidate).T
        metrics = [
            st.MetricBlocks(
                str(m),
                False,
                list(first[m, :num_blocks]),
                list(second[m, :num_blocks] * slow_down),
                list(first[m, num_blocks:]),
                list(second[m, num_blocks:]),
            )
            for m in range(first.shape[0])
        ]
        judged = st.judge(metrics, seed=repeat)
        found = [
            f + (j.verdict in ("faster", "slower")) for f, j in zip(found or [0] * len(judged), judged, strict=True)
        ]
    return found


def test_equal_endpoints_are_called_equal_on_synthetic_noise() -> None:
    assert max(count_verdicts(_synthetic, 1.0)) <= 15


def test_a_ten_percent_slow_down_is_found_on_synthetic_noise() -> None:
    assert min(count_verdicts(_synthetic, 1.1)) >= 180


def test_power_grows_with_blocks() -> None:
    counts = [sum(count_verdicts(_synthetic, 1.05, num_blocks, 60)) for num_blocks in (4, 8, 16)]
    assert all(a < b for a, b in pairwise(counts))
