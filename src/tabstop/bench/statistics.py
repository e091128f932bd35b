"""Statistics of a benchmark: percentiles with intervals, ratios of paired blocks, Holm, verdicts, early stopping.

Knows numbers only: no requests, no clocks, no files. Failed requests arrive here as +infinity, so percentiles are order
statistics (never interpolated). Intervals are 95 % unless said otherwise.

Sources: order-statistic intervals: David & Nagaraja, Order Statistics, 7.1; studentised bootstrap: Davison & Hinkley,
Bootstrap Methods, 5.2; trimmed means: Yuen 1974; Holm 1979; Wilson 1927; early stopping: MLPerf Inference rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special

TRIM = 0.2  # of the blocks, at each end
NORMAL_MAD = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
Floats = NDArray[np.float64]
Verdict = Literal["faster", "slower", "no difference", "not comparable"]


class Estimate(msgspec.Struct, frozen=True):
    """A number with its interval. `value` is None when the sample cannot say; `note` then tells why."""

    value: float | None
    low: float | None
    high: float | None
    num_samples: int
    note: str = ""


class Difference(msgspec.Struct, frozen=True):
    """What paired blocks say about one metric: candidate / baseline."""

    ratio: float | None
    low: float | None
    high: float | None
    p_value: float
    num_blocks: int
    note: str = ""


class Judgement(msgspec.Struct, frozen=True):
    """One line of a comparison: the verdict on one metric and what it rests on."""

    metric: str
    verdict: Verdict
    difference: Difference
    p_holm: float
    noise_floor: float | None  # relative: 0.02 = A against itself moves by up to 2 %
    reason: str = ""


# ---------------------------------------------------------------------------------------------------- percentiles


def percentile(values: Sequence[float] | Floats, q: float) -> float:
    """The smallest value with at least a share `q` (0..1) of the sample at or below it. Raises ValueError if empty."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if len(ordered) == 0:
        raise ValueError("percentile of nothing")
    return float(ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)])


def percentile_ranks(num_samples: int, q: float, confidence: float = 0.95) -> tuple[int | None, int | None]:
    """1-based ranks (low, high) whose order statistics enclose the true percentile, each side with (1+confidence)/2.

    A side is None where the sample is too small: the true value may lie beyond its smallest or largest member.
    """
    tail = (1 - confidence) / 2
    ranks = np.arange(num_samples + 1, dtype=np.float64)
    below = special.bdtr(ranks, num_samples, q) if num_samples else np.zeros(1)  # P(at most k samples under it)
    lows = np.flatnonzero(below <= tail)  # P(X_(k+1) > x_q) <= tail
    highs = np.flatnonzero(below[:-1] >= 1 - tail)  # P(X_(k+1) >= x_q) >= 1 - tail
    low = int(lows[-1]) + 1 if len(lows) else None
    high = int(highs[0]) + 1 if len(highs) else None
    return low, high


def estimate_percentile(values: Sequence[float] | Floats, q: float, confidence: float = 0.95) -> Estimate:
    """A percentile with its order-statistic interval, or "not estimable" where a side of the interval is missing."""
    num_samples = len(values)
    low, high = percentile_ranks(num_samples, q, confidence)
    if low is None or high is None:
        needed = smallest_sample(q, confidence)
        note = f"not estimable: p{100 * q:g} needs {needed} samples, there are {num_samples}"
        return Estimate(None, None, None, num_samples, note)
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return Estimate(percentile(ordered, q), float(ordered[low - 1]), float(ordered[high - 1]), num_samples)


def smallest_sample(q: float, confidence: float = 0.95) -> int:
    """The fewest samples for which both sides of the percentile's interval exist."""
    rarest = min(q, 1 - q)
    return math.ceil(math.log((1 - confidence) / 2) / math.log(1 - rarest))


def estimate_mean(values: Sequence[float] | Floats, num_batches: int = 20, confidence: float = 0.95) -> Estimate:
    """Mean of a series in time order, with a batch-means interval (neighbours in a run are not independent)."""
    series = np.asarray(values, dtype=np.float64)
    num_batches = min(num_batches, len(series) // 2)
    if len(series) == 0:
        return Estimate(None, None, None, 0, "not estimable: no samples")
    mean = float(series.mean())
    if num_batches < 4 or not math.isfinite(mean):
        return Estimate(mean, None, None, len(series), "no interval: too few samples or failures among them")
    means = np.array([batch.mean() for batch in np.array_split(series, num_batches)])
    half = float(special.stdtrit(num_batches - 1, (1 + confidence) / 2) * means.std(ddof=1) / math.sqrt(num_batches))
    return Estimate(mean, mean - half, mean + half, len(series))


def wilson(num_good: int, num_total: int, confidence: float = 0.95) -> Estimate:
    """A share with its Wilson score interval."""
    if num_total == 0:
        return Estimate(None, None, None, 0, "not estimable: nothing was sent")
    z = float(special.ndtri((1 + confidence) / 2))
    share = num_good / num_total
    centre = share + z * z / (2 * num_total)
    half = z * math.sqrt(share * (1 - share) / num_total + z * z / (4 * num_total**2))
    scale = 1 + z * z / num_total
    return Estimate(share, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), num_total)


# ------------------------------------------------------------------------------------------------- early stopping


def required_queries(num_over: int, q: float, confidence: float = 0.99) -> int:
    """The fewest queries with which `num_over` of them beyond the limit still prove "a share q is within it"."""

    def proves(num_queries: int) -> bool:
        return float(special.bdtr(num_over, num_queries, 1 - q)) <= 1 - confidence

    high = num_over + 1
    while not proves(high):
        high *= 2
    low = high // 2
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if proves(middle) else (middle + 1, high)
    return low


def early_decision(num_queries: int, num_over: int, q: float, confidence: float = 0.99) -> bool | None:
    """True: the limit is proven to be met; False: proven to be missed; None: more queries are needed."""
    if num_queries and num_queries >= required_queries(num_over, q, confidence):
        return True
    # Missed: so many late ones would appear with probability <= 1 - confidence if exactly 1 - q were late.
    if num_over and float(special.bdtrc(num_over - 1, num_queries, 1 - q)) <= 1 - confidence:
        return False
    return None


# ------------------------------------------------------------------------------------------------ paired comparison


def trimmed(values: Floats) -> tuple[Floats, Floats, int]:
    """20 % trimmed means of the rows, their standard errors from winsorised variances, and Yuen's degrees of freedom.

    shape: (..., n) → (...,), (...,). One machine hiccup spoils one block; the plain mean would let it spoil the answer.
    """
    num = values.shape[-1]
    cut = int(TRIM * num)
    ordered = np.sort(values, axis=-1)
    means = ordered[..., cut : num - cut].mean(axis=-1)
    winsorised = np.clip(ordered, ordered[..., cut : cut + 1], ordered[..., num - cut - 1 : num - cut])
    num_kept = num - 2 * cut
    squares = ((winsorised - winsorised.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    return means, np.sqrt(squares / (num_kept * (num_kept - 1))), num_kept - 1


def paired_ratio(
    baseline: Sequence[float], candidate: Sequence[float], rng: np.random.Generator, num_resamples: int = 4000
) -> Difference:
    """Studentised bootstrap over blocks of the trimmed mean of log(candidate / baseline).

    The block is the unit, because requests of one block share the machine's mood. Each resample draws blocks with
    replacement; its t statistic is centred on the observed mean, which gives the interval; Yuen's t gives the p-value.
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    num_blocks = len(first)
    reason = ""
    if num_blocks < 4:
        reason = "fewer than 4 blocks"
    elif not (np.isfinite(first).all() and np.isfinite(second).all()):
        reason = "failures reach this metric (infinite latency)"
    elif (first <= 0).any() or (second <= 0).any():
        reason = "a block's value is zero"
    if reason:
        return Difference(None, None, None, 1.0, num_blocks, reason)
    logs = np.log(second / first)
    means, errors, freedom = trimmed(logs)
    mean, error = float(means), float(errors)
    if error < 1e-9:
        ratio = math.exp(mean)
        return Difference(ratio, ratio, ratio, 1.0 if abs(mean) < 1e-9 else 0.0, num_blocks, "blocks do not vary")
    draws = logs[rng.integers(num_blocks, size=(num_resamples, num_blocks))]
    drawn_means, drawn_errors, _ = trimmed(draws)
    keep = drawn_errors > 0.05 * error  # a resample of nearly one block alone has no spread to divide by
    low, high = np.quantile((drawn_means[keep] - mean) / drawn_errors[keep], [0.025, 0.975])
    p_value = 2 * float(special.stdtr(freedom, -abs(mean / error)))
    ends = math.exp(mean - float(high) * error), math.exp(mean - float(low) * error)
    return Difference(math.exp(mean), *ends, p_value, num_blocks)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the result is below alpha, family-wise."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for position, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def noise_floor(baseline: Sequence[float], again: Sequence[float], num_blocks: int) -> float | None:
    """How far A moves against itself: 95 % half-width of the mean log ratio over `num_blocks` blocks (relative).

    From the median distance from 1 (so that one hiccup does not set it) of an A/A run of at least 3 blocks of the same
    design. None where the A/A run cannot say.
    """
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(again, dtype=np.float64)
    if len(first) < 3 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    if (first <= 0).any() or (second <= 0).any():
        return None
    deviation = NORMAL_MAD * float(np.median(np.abs(np.log(second / first))))  # around 0: A/A has no true difference
    return math.expm1(1.96 * deviation / math.sqrt(num_blocks))


class MetricBlocks(msgspec.Struct, frozen=True):
    """One metric's value per block for both endpoints, and per A/A block (may be empty)."""

    metric: str
    higher_is_better: bool
    baseline: list[float]
    candidate: list[float]
    aa_first: list[float] = []
    aa_second: list[float] = []


def judge(
    metrics: Sequence[MetricBlocks], seed: int, alpha: float = 0.05, minimum_effect: float = 0.01
) -> list[Judgement]:
    """A verdict per metric, family-wise error `alpha` over all of them.

    faster or slower only if (1) Holm's p is below alpha, (2) the interval leaves 1 out (few wild blocks can have a
    small p and an interval that says nothing), (3) the ratio is further from 1 than A is from itself in the A/A run,
    and (4) further than `minimum_effect`, under which nobody cares.
    """
    rng = np.random.default_rng(seed)
    differences = [paired_ratio(m.baseline, m.candidate, rng) for m in metrics]
    testable = [i for i, d in enumerate(differences) if d.ratio is not None]
    adjusted = dict(zip(testable, holm([differences[i].p_value for i in testable]), strict=True))
    return [
        _judge_one(m, d, adjusted.get(i, 1.0), alpha, minimum_effect)
        for i, (m, d) in enumerate(zip(metrics, differences, strict=True))
    ]


def _judge_one(
    blocks: MetricBlocks, difference: Difference, p_holm: float, alpha: float, minimum_effect: float
) -> Judgement:
    floor = noise_floor(blocks.aa_first, blocks.aa_second, difference.num_blocks) if blocks.aa_first else None
    if difference.ratio is None:
        return Judgement(blocks.metric, "not comparable", difference, 1.0, floor, difference.note)
    distance = abs(math.log(difference.ratio))
    if p_holm >= alpha:
        reason = f"Holm p = {p_holm:.3f}"
    elif difference.low is None or difference.high is None or difference.low <= 1 <= difference.high:
        reason = "the interval holds 1: too few or too uneven blocks"
    elif distance < math.log1p(minimum_effect):
        reason = f"smaller than {100 * minimum_effect:g} %"
    elif floor is not None and distance < math.log1p(floor):
        reason = f"within the noise floor of ±{100 * floor:.1f} %"
    else:
        is_better = (difference.ratio > 1) == blocks.higher_is_better
        return Judgement(blocks.metric, "faster" if is_better else "slower", difference, p_holm, floor)
    return Judgement(blocks.metric, "no difference", difference, p_holm, floor, reason)
