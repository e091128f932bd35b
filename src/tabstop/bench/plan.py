"""How many replicas a trace needs: a discrete-event replay of the trace over N replicas, fitted from a measured run.

A replica prefills one prompt after another (start + tokens / rate) and decodes all its running requests together, each
token taking base + slope × (running requests). It never runs more requests at once than were measured, and prompts
longer than measured are refused: nothing is extrapolated. Knows traces and reports, no servers.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from tabstop.bench.metrics import Slo
from tabstop.bench.records import Record
from tabstop.bench.report import BenchReport
from tabstop.bench.statistics import Floats, percentile
from tabstop.bench.workloads.trace import Trace
from tabstop.errors import InputError

MAX_REPLICAS = 512
PROMPT_SLACK = 1.05
NUM_RESAMPLES = 20
FASTEST_SHARE = 0.1
MAX_FITTED = 400  # requests in the fit
RESAMPLE_BLOCK = 300.0  # seconds: whole bursts stay together


class ReplicaModel(msgspec.Struct, frozen=True, kw_only=True):
    """A replica's speed, and how far it was measured."""

    prefill_start: float  # seconds
    prefill_rate: float  # uncached prompt tokens/s
    decode_base: float  # seconds a token
    decode_slope: float  # seconds a token and running request
    max_running: int  # requests at once that were measured
    max_prompt: int  # tokens that were measured
    relative_error: float = 0.05  # of the speeds
    source: str = ""

    def decode_step(self, num_running: int) -> float:
        return self.decode_base + self.decode_slope * num_running


class Replay(msgspec.Struct, frozen=True):
    """What the requests of a trace would see. shape: (num_requests,). unit: seconds"""

    ttft: np.ndarray
    tpot: np.ndarray
    busy: float  # share of the replicas' prefill time


class Plan(msgspec.Struct, kw_only=True):
    """The answer: replicas for the trace, its interval, and what a Poisson process of the same rate would have said."""

    replicas: int
    low: int
    high: int
    poisson_replicas: int
    ttft: float  # at the SLO's percentile
    tpot: float
    table: list[tuple[int, float, float]]  # replicas, TTFT, TPOT at the percentile
    percentile: float
    mean_rate: float
    model: ReplicaModel
    cost_per_month: float | None = None


# --------------------------------------------------------------------------------------------------------- fitting


def fit(report: BenchReport, records: Sequence[Record] = ()) -> ReplicaModel:
    """A replica's model from a run or (better) a sweep. Raises InputError if the report cannot carry one."""
    from scipy import optimize  # here, because half a second of import is much for commands that never fit

    summaries = [p.summary for p in report.sweep.points] if report.sweep else [run.summary for run in report.runs[:1]]
    points = [(s.concurrency, s.service_latencies["tpot"].percentiles["p50"].value) for s in summaries if _has_tpot(s)]
    points = [(b, t) for b, t in points if t is not None]
    lengths = [s.prompt_lengths for s in summaries if s.prompt_lengths]
    if not points or not lengths:
        raise InputError(
            "the report has no time per output token or no prompt lengths: run it streaming, with --output over 1"
        )
    running = np.array([b for b, _ in points])
    step = np.array([t for _, t in points], dtype=np.float64)
    if len(points) >= 2 and running.max() > 1.5 * running.min():
        (base, slope), _ = optimize.nnls(np.stack([np.ones(len(running)), running], axis=1), step)
    else:
        base, slope = float(step.max()), 0.0
    start, rate = fit_prefill(records) or _prefill_from(summaries)
    return ReplicaModel(
        prefill_start=start,
        prefill_rate=rate,
        decode_base=float(base),
        decode_slope=float(slope),
        max_running=max(1, math.ceil(float(running.max()))),
        max_prompt=int(max(length["max"] for length in lengths)),
        source=f"{report.kind} of {report.created}, {len(points)} loads" + (", per-request TTFT" if records else ""),
    )


def _has_tpot(summary: object) -> bool:
    return "tpot" in getattr(summary, "service_latencies", {})


def fit_prefill(records: Sequence[Record]) -> tuple[float, float] | None:
    """(start, tokens/s): the line under nine tenths of (uncached prompt, TTFT), because queueing only adds.

    Quantile regression as a linear program (Koenker & Bassett 1978). None if the prompts' lengths hardly vary.
    """
    from scipy import optimize

    pairs = [
        ((r.prompt_tokens or 0) - (r.cached_tokens or 0), r.chunks[0].at - r.sent)
        for r in records
        if r.outcome == "ok" and r.chunks and r.prompt_tokens
    ]
    pairs = pairs[:: max(1, len(pairs) // MAX_FITTED)]
    if len(pairs) < 20:
        return None
    tokens, seconds = np.array(pairs, dtype=np.float64).T
    if tokens.max() < 2 * max(1.0, tokens.min()):
        return None
    num = len(tokens)
    cost = np.concatenate([[0.0, 0.0], np.full(num, FASTEST_SHARE), np.full(num, 1 - FASTEST_SHARE)])
    line = np.column_stack([np.ones(num), tokens, np.eye(num), -np.eye(num)])
    start, per_token = optimize.linprog(cost, A_eq=line, b_eq=seconds, method="highs").x[:2]
    return (float(start), float(1 / per_token)) if per_token > 0 else None


def _prefill_from(summaries: Sequence[object]) -> tuple[float, float]:
    """Without varied lengths: the fastest load's median TTFT over its mean prompt, all of it taken as prefill."""
    rates = []
    for summary in summaries:
        ttft = summary.service_latencies["ttft"].percentiles["p50"].value  # type: ignore[attr-defined]
        if ttft:
            rates.append(summary.prompt_lengths["mean"] / ttft)  # type: ignore[attr-defined]
    if not rates:
        raise InputError("the report has no TTFT: nothing to fit a replica from")
    return 0.0, max(rates)


# ---------------------------------------------------------------------------------------------------------- replay


class _Replica:
    """One replica's queues. Decoding is processor sharing: `progress` counts tokens every running request has made."""

    def __init__(self, model: ReplicaModel) -> None:
        self.model = model
        self.prefill_free = 0.0
        self.busy = 0.0
        self.progress = 0.0  # tokens made by a request that has run since time zero
        self.clock = 0.0
        self.running: list[tuple[float, int]] = []  # heap of (progress at which it is done, request)
        self.waiting: deque[tuple[int, float]] = deque()  # prefilled, no room to decode
        self.admitted = 0

    def advance(self, now: float) -> None:
        if self.running:
            self.progress += (now - self.clock) / self.model.decode_step(len(self.running))
        self.clock = now

    def next_end(self) -> float:
        if not self.running:
            return math.inf
        left = self.running[0][0] - self.progress
        return self.clock + max(0.0, left) * self.model.decode_step(len(self.running))


def replay(trace: Trace, model: ReplicaModel, num_replicas: int) -> Replay:
    """Least-loaded dispatch (the replica whose prefill queue is free first); first come, first served in each."""
    num = len(trace.times)
    replicas = [_Replica(model) for _ in range(num_replicas)]
    first = np.empty(num)
    ends = np.empty(num)
    starts: list[list[tuple[float, int]]] = [[] for _ in replicas]
    free = [(0.0, index) for index in range(num_replicas)]
    for request in range(num):
        arrival = float(trace.times[request])
        free_at, index = heapq.heappop(free)
        begin = max(arrival, free_at)
        length = model.prefill_start + float(trace.inputs[request]) / model.prefill_rate
        replicas[index].busy += length
        first[request] = begin + length
        starts[index].append((begin + length, request))
        heapq.heappush(free, (begin + length, index))
    for replica, ready in zip(replicas, starts, strict=True):
        _decode(replica, ready, trace.outputs, ends)
    num_later = np.maximum(1, trace.outputs - 1)
    span = max(1e-9, float(trace.times[-1] - trace.times[0]))
    busy = sum(replica.busy for replica in replicas) / (num_replicas * span)
    return Replay(first - trace.times, (ends - first) / num_later, busy)


def _decode(replica: _Replica, ready: list[tuple[float, int]], outputs: np.ndarray, ends: np.ndarray) -> None:
    """Runs one replica's decoding: `ready` are (time of first token, request) in ascending order."""
    position = 0
    while position < len(ready) or replica.running or replica.waiting:
        arrival = ready[position][0] if position < len(ready) else math.inf
        end = replica.next_end()
        if end <= arrival:
            replica.advance(end)
            _, request = heapq.heappop(replica.running)
            ends[request] = end
            if replica.waiting:
                _admit(replica, replica.waiting.popleft()[0], outputs)
        else:
            replica.advance(arrival)
            request = ready[position][1]
            position += 1
            if outputs[request] <= 1:
                ends[request] = arrival
            elif len(replica.running) < replica.model.max_running:
                _admit(replica, request, outputs)
            else:
                replica.waiting.append((request, arrival))


def _admit(replica: _Replica, request: int, outputs: np.ndarray) -> None:
    heapq.heappush(replica.running, (replica.progress + float(outputs[request]) - 1, request))


# --------------------------------------------------------------------------------------------------------- answers


def poisson_like(trace: Trace, rng: np.random.Generator) -> Trace:
    """The same requests in random order at a Poisson process of the same mean rate."""
    num = len(trace.times)
    span = float(trace.times[-1] - trace.times[0])
    times = np.sort(rng.uniform(0, span, num))
    order = rng.permutation(num)
    return Trace(times, trace.inputs[order], trace.outputs[order])


def resampled(trace: Trace, rng: np.random.Generator, block: float = RESAMPLE_BLOCK) -> Trace:
    """Blocks of the trace's time drawn with replacement, so that bursts stay whole."""
    span = float(trace.times[-1]) + 1e-6
    num_blocks = max(1, round(span / block))
    length = span / num_blocks
    parts: list[tuple[Floats, np.ndarray, np.ndarray]] = []
    for position, chosen in enumerate(rng.integers(num_blocks, size=num_blocks)):
        inside = (trace.times >= chosen * length) & (trace.times < (chosen + 1) * length)
        shifted = trace.times[inside] - chosen * length + position * length
        parts.append((shifted, trace.inputs[inside], trace.outputs[inside]))
    times, inputs, outputs = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Trace(times, inputs, outputs) if len(times) else trace


def check_range(trace: Trace, model: ReplicaModel) -> None:
    """Raises InputError where the trace goes past what was measured."""
    if trace.times[-1] <= trace.times[0]:
        raise InputError("all requests of the trace come at one time: it has no rate to plan for")
    longest = int(trace.inputs.max())
    if longest > PROMPT_SLACK * model.max_prompt:
        raise InputError(
            f"the trace has prompts of up to {longest} tokens, the run measured up to {model.max_prompt}: "
            f"measure with longer prompts (--input 100:{longest}, or --workload trace), this is not extrapolated"
        )
    if model.max_running < 2:
        raise InputError("the run measured one request at a time: measure a sweep, concurrency is not extrapolated")


def meets_slo(replayed: Replay, slo: Slo, q: float) -> bool:
    return (slo.ttft is None or percentile(replayed.ttft, q) <= slo.ttft) and (
        slo.tpot is None or percentile(replayed.tpot, q) <= slo.tpot
    )


def fewest_replicas(trace: Trace, model: ReplicaModel, slo: Slo, q: float) -> int:
    """By doubling and bisection. Raises InputError if no number of replicas meets the SLO."""
    high = 1
    while not meets_slo(replay(trace, model, high), slo, q):
        high *= 2
        if high > MAX_REPLICAS:
            raise InputError(
                f"no number of replicas up to {MAX_REPLICAS} meets the SLO: one request alone is already too slow "
                "(a replica that is faster for single requests is needed)"
            )
    low = high // 2 + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets_slo(replay(trace, model, middle), slo, q) else (middle + 1, high)
    return high


def perturbed(model: ReplicaModel, rng: np.random.Generator) -> ReplicaModel:
    """The model with its speeds off by their relative error."""
    prefill, decode = np.exp(rng.normal(0, model.relative_error, 2))
    return msgspec.structs.replace(
        model,
        prefill_rate=model.prefill_rate * prefill,
        decode_base=model.decode_base * decode,
        decode_slope=model.decode_slope * decode,
    )


def make_plan(trace: Trace, model: ReplicaModel, slo: Slo, q: float = 0.99, seed: int = 0) -> Plan:
    """The plan. Its interval (5 % to 95 %) comes from resampled traces and perturbed speeds. Raises InputError."""
    check_range(trace, model)
    rng = np.random.default_rng([seed, 5])
    replicas = fewest_replicas(trace, model, slo, q)
    needed = [replicas]
    for _ in range(NUM_RESAMPLES):
        needed.append(fewest_replicas(resampled(trace, rng), perturbed(model, rng), slo, q))
    low, high = np.quantile(needed, [0.05, 0.95], method="inverted_cdf")
    around = sorted({n for n in (1, replicas // 2, replicas - 1, replicas, replicas + 1, 2 * replicas) if n >= 1})
    replays = {n: replay(trace, model, n) for n in around}
    return Plan(
        replicas=replicas,
        low=int(min(low, replicas)),
        high=int(max(high, replicas)),
        poisson_replicas=fewest_replicas(poisson_like(trace, rng), model, slo, q),
        ttft=percentile(replays[replicas].ttft, q),
        tpot=percentile(replays[replicas].tpot, q),
        table=[(n, percentile(r.ttft, q), percentile(r.tpot, q)) for n, r in replays.items()],
        percentile=q,
        mean_rate=len(trace.times) / max(1e-9, float(trace.times[-1])),
        model=model,
    )
