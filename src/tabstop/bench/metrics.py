"""Request records → numbers: latencies on two clocks, throughput in the steady window, goodput, token accounts.

Definitions (docs/benchmarking.md has them in one line each) live here and nowhere else. Knows no statistics beyond
calling statistics.py, and no files. Failures and timeouts enter every latency as +infinity; requests that the client
itself cancelled enter none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from tabstop.bench.records import Record
from tabstop.bench.statistics import Estimate, Floats, estimate_mean, estimate_percentile, wilson

PERCENTILES = (0.5, 0.9, 0.95, 0.99)
SHORT_COMPLETION = 32  # tokens; code completions have a median of 13


class Slo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits that a good request keeps. unit: seconds"""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None
    itl_max: float | None = None  # the longest stall between two tokens


class Window(msgspec.Struct, frozen=True):
    """The part of a run that counts. unit: seconds since the start"""

    start: float
    end: float
    note: str = ""

    @property
    def length(self) -> float:
        return self.end - self.start


class Latency(msgspec.Struct, frozen=True):
    """One latency: percentiles keyed "p50" … and a mean over the finite values. unit: seconds"""

    percentiles: dict[str, Estimate]
    mean: Estimate


class TokenAccount(msgspec.Struct, frozen=True):
    """Sums over finished requests, and in how many of them two sources disagree."""

    prompt: int
    cached: int | None  # None: the server does not say
    output_by_server: int | None
    output_counted: int
    output_retokenized: int | None
    num_output_mismatches: int  # our count of the stream ≠ the server's usage
    num_retokenized_mismatches: int  # re-tokenised text ≠ the server's usage, or our count where it has none
    num_prompt_mismatches: int  # the server's prompt length ≠ what the workload meant
    num_unlimited: int  # answers longer than max_tokens
    count_sources: dict[str, int]
    num_retokenized: int = 0  # answers that were re-tokenised


class Summary(msgspec.Struct, frozen=True):
    """Everything that one run says about one endpoint."""

    window: Window
    num_requests: int
    outcomes: dict[str, int]
    errors: dict[str, int]  # message → how often
    finish_reasons: dict[str, int]
    latencies: dict[str, Latency]  # from the intended send time
    service_latencies: dict[str, Latency]  # from the real send time
    output_tokens_per_s: Estimate
    prompt_tokens_per_s: Estimate
    requests_per_s: Estimate
    offered_requests_per_s: float
    concurrency: float  # time average in the window
    attainment: Estimate | None  # share of all sent that kept the SLO
    goodput: float | None  # requests/s that kept the SLO
    tokens: TokenAccount
    prompt_lengths: dict[str, float]
    output_lengths: dict[str, float]
    kinds: dict[str, int]


# ------------------------------------------------------------------------------------------------- of one request


def is_failure(record: Record) -> bool:
    return record.outcome in ("error", "timeout")


def counts_for_latency(record: Record) -> bool:
    """The client's own cancellations say nothing about how long the server would have taken."""
    return record.outcome not in ("cancelled", "superseded")


def ttft(record: Record, *, from_sent: bool = False) -> float:
    """Time to the first chunk with text or tokens (of a whole answer: to its end; latency_samples leaves that out)."""
    if is_failure(record) or not record.chunks:
        return math.inf
    return record.chunks[0].at - (record.sent if from_sent else record.intended)


def e2e(record: Record, *, from_sent: bool = False) -> float:
    """Time to the end of the stream."""
    return math.inf if is_failure(record) else record.ended - (record.sent if from_sent else record.intended)


def tpot(record: Record) -> float | None:
    """(last − first chunk) / tokens after the first chunk. None for an answer of one chunk."""
    if is_failure(record):
        return math.inf
    num_later = sum(max(0, chunk.num_tokens) for chunk in record.chunks[1:])
    return (record.chunks[-1].at - record.chunks[0].at) / num_later if num_later else None


def token_gaps(record: Record) -> Floats:
    """Time between tokens: a chunk of k tokens gives k gaps of (its distance to the chunk before) / k.

    Chunks without a token (an unfinished character, a finish reason) pass their time on to the next one.
    """
    gaps: list[Floats] = []
    previous = record.chunks[0].at if record.chunks else 0.0
    for chunk in record.chunks[1:]:
        if chunk.num_tokens > 0:
            gaps.append(np.full(chunk.num_tokens, (chunk.at - previous) / chunk.num_tokens))
            previous = chunk.at
    return np.concatenate(gaps) if gaps else np.empty(0)


def meets(record: Record, slo: Slo) -> bool:
    """True if the request kept every limit, measured from its intended send time."""
    if record.outcome != "ok":
        return False
    per_token = tpot(record)
    gaps = token_gaps(record) if slo.itl_max is not None else np.empty(0)
    return (
        (slo.ttft is None or ttft(record) <= slo.ttft)
        and (slo.tpot is None or per_token is None or per_token <= slo.tpot)
        and (slo.e2e is None or e2e(record) <= slo.e2e)
        and (slo.itl_max is None or len(gaps) == 0 or float(gaps.max()) <= slo.itl_max)
    )


# ------------------------------------------------------------------------------------------------------ of a run


def steady_window(records: Sequence[Record], warm_up: float = 0.0) -> Window:
    """From the end of the warm-up to the last send: later the load drains and flatters.

    A burst has no steady state; then the whole run counts and the note says so.
    """
    if not records:
        return Window(0.0, 0.0, "nothing was sent")
    last_send = max(record.sent for record in records)
    last_end = max(record.ended for record in records)
    typical = float(np.median([record.ended - record.sent for record in records]))
    num_inside = sum(record.intended >= warm_up and record.ended <= last_send for record in records)
    if last_send - warm_up > typical and num_inside >= max(5, len(records) // 4):
        return Window(warm_up, last_send)
    if warm_up >= last_end:
        warm_up = 0.0
    return Window(warm_up, last_end, "no steady state: the whole run counts, ramp and drain included")


def latency_samples(records: Sequence[Record], *, from_sent: bool) -> dict[str, Floats]:
    """Every latency's samples in order of sending, failures as infinity. unit: seconds

    Whole answers have an end only: no time to a first token and none between tokens.
    """
    ordered = sorted((r for r in records if counts_for_latency(r)), key=lambda record: record.intended)
    streamed = [record for record in ordered if not record.is_whole]
    per_token = [value for record in streamed if (value := tpot(record)) is not None]
    gaps = [token_gaps(record) for record in streamed if not is_failure(record)]
    short = [r for r in ordered if is_failure(r) or r.num_tokens <= SHORT_COMPLETION]
    samples = {
        "ttft": np.array([ttft(record, from_sent=from_sent) for record in streamed]),
        "itl": np.concatenate(gaps) if gaps else np.empty(0),
        "tpot": np.array(per_token),
        "e2e": np.array([e2e(record, from_sent=from_sent) for record in ordered]),
        "completion": np.array([e2e(record, from_sent=from_sent) for record in short]),
    }
    return {name: values for name, values in samples.items() if len(values)}


def describe(values: Floats) -> Latency:
    finite = values[np.isfinite(values)]
    mean = estimate_mean(finite)
    if mean.low is not None:
        mean = msgspec.structs.replace(mean, low=max(0.0, mean.low))  # no latency is negative
    if len(finite) < len(values):
        mean = Estimate(None, None, None, len(values), f"infinite: {len(values) - len(finite)} failures")
    return Latency({f"p{100 * q:g}": _finite(estimate_percentile(values, q)) for q in PERCENTILES}, mean)


def _finite(estimate: Estimate) -> Estimate:
    """JSON has no infinity: a percentile that failures reach has no value and says so."""
    if estimate.value is not None and math.isinf(estimate.value):
        return Estimate(None, None, None, estimate.num_samples, "infinite: failures reach this percentile")
    if estimate.high is not None and math.isinf(estimate.high):
        return msgspec.structs.replace(estimate, high=None, note="upper end infinite: failures reach it")
    return estimate


def rate_in_window(times: Floats, weights: Floats, window: Window, num_bins: int = 20) -> Estimate:
    """Sum of weights / second inside the window, with a batch-means interval over equal time bins."""
    if window.length <= 0:
        return Estimate(None, None, None, 0, "not estimable: empty window")
    inside = (times >= window.start) & (times <= window.end)
    bins, _ = np.histogram(times[inside], bins=num_bins, range=(window.start, window.end), weights=weights[inside])
    estimate = estimate_mean(bins / (window.length / num_bins), num_batches=num_bins // 2)
    low = None if estimate.low is None else max(0.0, estimate.low)  # a rate is never negative
    return msgspec.structs.replace(estimate, low=low, num_samples=int(inside.sum()))


def _token_times(records: Sequence[Record]) -> tuple[Floats, Floats]:
    pairs = [(chunk.at, max(0, chunk.num_tokens)) for record in records for chunk in record.chunks]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def mean_concurrency(records: Sequence[Record], window: Window) -> float:
    """Requests in flight, averaged over the window's time."""
    if window.length <= 0:
        return 0.0
    overlaps = (max(0.0, min(r.ended, window.end) - max(r.sent, window.start)) for r in records)
    return sum(overlaps) / window.length


def account(records: Sequence[Record]) -> TokenAccount:
    """Token sums over requests that ran to their end."""
    done = [record for record in records if record.outcome == "ok"]
    stated = [r for r in done if r.completion_tokens is not None]
    retokenized = [r for r in done if r.retokenized_tokens is not None]
    cached = [r.cached_tokens for r in done if r.cached_tokens is not None]
    return TokenAccount(
        prompt=sum(r.prompt_tokens or r.expected_prompt_tokens or 0 for r in done),
        cached=sum(cached) if cached else None,
        output_by_server=sum(r.completion_tokens or 0 for r in stated) if stated else None,
        output_counted=sum(r.counted_tokens or 0 for r in done),
        output_retokenized=sum(r.retokenized_tokens or 0 for r in retokenized) if retokenized else None,
        num_output_mismatches=sum(r.counted_tokens != r.completion_tokens for r in stated),
        num_retokenized=len(retokenized),
        num_retokenized_mismatches=sum(r.retokenized_tokens != r.num_tokens for r in retokenized),
        num_prompt_mismatches=sum(
            r.prompt_tokens != r.expected_prompt_tokens
            for r in done
            if r.prompt_tokens is not None and r.expected_prompt_tokens is not None
        ),
        num_unlimited=sum(r.num_tokens > r.max_tokens for r in done if r.max_tokens),
        count_sources=dict(Counter(r.count_source for r in done)),
    )


def _lengths(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    levels = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "mean": float(np.mean(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        **{name: float(np.quantile(values, q, method="inverted_cdf")) for name, q in levels.items()},
    }


def summarize(records: Sequence[Record], slo: Slo | None = None, warm_up: float = 0.0) -> Summary:
    """All numbers of one run. `records` may hold failures and cancellations; it must not be empty."""
    window = steady_window(records, warm_up)
    inside = [r for r in records if window.start <= r.intended <= window.end]
    relevant = [r for r in inside if counts_for_latency(r)]
    num_good = sum(meets(record, slo) for record in relevant) if slo else 0
    ends = np.array([r.ended for r in records if r.outcome == "ok"])
    starts = [(r.chunks[0].at, r.prompt_tokens or r.expected_prompt_tokens or 0) for r in records if r.chunks]
    prompts = np.array(starts, dtype=np.float64).reshape(-1, 2)
    done = [r for r in records if r.outcome == "ok"]
    return Summary(
        window=window,
        num_requests=len(records),
        outcomes=dict(Counter(r.outcome for r in records)),
        errors=dict(Counter(r.error for r in records if r.error).most_common(10)),
        finish_reasons=dict(Counter(str(r.finish_reason) for r in done)),
        latencies={k: describe(v) for k, v in latency_samples(inside, from_sent=False).items()},
        service_latencies={k: describe(v) for k, v in latency_samples(inside, from_sent=True).items()},
        output_tokens_per_s=rate_in_window(*_token_times(records), window),
        prompt_tokens_per_s=rate_in_window(prompts[:, 0], prompts[:, 1], window),
        requests_per_s=rate_in_window(ends, np.ones(len(ends)), window),
        offered_requests_per_s=len(inside) / window.length if window.length > 0 else 0.0,
        concurrency=mean_concurrency(records, window),
        attainment=wilson(num_good, len(relevant)) if slo else None,
        goodput=num_good / window.length if slo and window.length > 0 else None,
        tokens=account(records),
        prompt_lengths=_lengths([n for r in done if (n := r.prompt_tokens or r.expected_prompt_tokens)]),
        output_lengths=_lengths([r.num_tokens for r in done]),
        kinds=dict(Counter(r.kind for r in records)),
    )
