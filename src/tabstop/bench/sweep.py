"""The sweep: a latency-throughput curve, the saturation point, and the largest rate that provably meets the SLO.

Rates are open loop, in sessions a second; a session of most workloads is one request. Each rate of the search stops as
soon as the binomial rule (statistics.early_decision) proves that the SLO is met or missed; an undecided rate counts as
not met. The rule needs independent trials, and turns of one conversation are none: so the session is the trial, and it
is good if every one of its requests was.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from tabstop.bench.client import Endpoint
from tabstop.bench.metrics import Slo, Summary, counts_for_latency, meets
from tabstop.bench.records import Record
from tabstop.bench.run import LoadSpec, Outcome, Report, RunSetup, execute
from tabstop.bench.statistics import early_decision, required_queries
from tabstop.bench.workers import WorkerPool
from tabstop.bench.workloads.prompts import PromptMaker

CURVE_SHARES = (0.1, 0.25, 0.5, 0.7, 0.85, 0.95, 1.1)  # of the saturated throughput
KEEPS_UP = 0.95  # a rate is sustained if so much of it is completed


class SweepSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How far and how finely to search."""

    percentile: float = 0.99  # share of requests that must keep the SLO
    confidence: float = 0.99
    max_requests: int = 2000  # per rate of the search
    min_duration: float = 10.0  # seconds a rate must last before it can pass: a queue needs time to grow
    curve_requests: int = 200  # per rate of the curve
    saturating_concurrency: int = 64
    precision: float = 0.05  # the search ends when the two rates are so close
    max_steps: int = 10


class RatePoint(msgspec.Struct, kw_only=True):
    """One rate that was tried."""

    rate: float  # sessions/s
    purpose: str  # saturation | curve | search
    num_requests: int
    num_over: int  # requests beyond the SLO
    num_sessions: int = 0
    is_met: bool | None  # None: undecided, or no SLO
    invalid: list[str]
    summary: Summary


class SweepResult(msgspec.Struct, kw_only=True):
    """The capacity lies between `met` and `missed`. unit of both and of `last_sustained`: sessions/s"""

    points: list[RatePoint]
    saturated_requests_per_s: float
    saturated_tokens_per_s: float
    last_sustained: float | None  # of the curve
    saturated_sessions_per_s: float | None = None
    is_saturated: bool = True  # False: even the curve's highest rate was kept up, so "saturated" was not the limit
    met: float | None = None
    missed: float | None = None
    slo: Slo | None = None
    percentile: float = 0.99
    is_interrupted: bool = False


class SloWatch:
    """Counts sessions in the order of their starts, so that slow ones are not missed while they still run."""

    def __init__(self, slo: Slo, spec: SweepSpec) -> None:
        self.slo, self.spec = slo, spec
        self.turns_left: dict[int, int] = {}  # of sessions that have begun to end
        self.over: set[int] = set()  # sessions with a request beyond the SLO
        self.waiting: dict[int, bool] = {}
        self.num_decided = 0  # leading sessions that have all ended
        self.num_over = 0  # among them
        self.num_over_known = 0
        self.next_look = required_queries(0, spec.percentile, spec.confidence)
        self.last_session = 0
        self.is_met: bool | None = None

    def take(self, record: Record) -> bool:
        """True when nothing more needs to be sent."""
        number = record.session
        if counts_for_latency(record) and not meets(record, self.slo) and number not in self.over:
            self.over.add(number)
            self.num_over_known += 1
        self.turns_left[number] = self.turns_left.get(number, record.num_turns) - 1
        if not self.turns_left[number]:
            self.waiting[number] = number in self.over
            del self.turns_left[number]
        self.last_session = max(self.last_session, number)
        while self.num_decided in self.waiting:
            self.num_over += self.waiting.pop(self.num_decided)
            self.num_decided += 1
        if max(self.num_decided, self.last_session + 1) >= self.next_look:
            self.is_met = self._look(record.intended)
        return self.is_met is not None

    def _look(self, now: float) -> bool | None:
        """Looks grow further apart by half each time, because every look is another chance to be wrong."""
        level, confidence = self.spec.percentile, self.spec.confidence
        self.next_look = math.ceil(1.5 * max(self.num_decided, self.last_session + 1))
        # All up to the last one that ended were sent; what still runs is taken as good: then missing is certain.
        if early_decision(self.last_session + 1, self.num_over_known, level, confidence) is False:
            return False
        decision = early_decision(self.num_decided, self.num_over, level, confidence)
        if decision and now < self.spec.min_duration:
            self.next_look = self.last_session + 2
            return None
        return decision


class Sweep:
    """One endpoint's sweep. `report(title)` gives the progress callback of each run; set it before run()."""

    def __init__(
        self, pool: WorkerPool, endpoint: Endpoint, setup: RunSetup, spec: SweepSpec, maker: PromptMaker
    ) -> None:
        self.pool, self.endpoint, self.setup, self.spec, self.maker = pool, endpoint, setup, spec, maker
        self.report: Callable[[str], Report | None] = lambda title: None
        self.points: list[RatePoint] = []
        self.is_interrupted = False
        self.num_runs = 0
        self.first: Outcome | None = None  # of the saturating run

    def run(self) -> SweepResult:
        """Saturate, draw the curve, then search if there is an SLO."""
        saturation = self._run("saturation", LoadSpec(concurrency=self.spec.saturating_concurrency), None)
        most = self.points[0].rate or 1.0
        for share in CURVE_SHARES:
            if not self.is_interrupted:
                self._run("curve", self._open(most * share), None)
        result = SweepResult(
            points=self.points,
            saturated_requests_per_s=saturation.requests_per_s.value or saturation.offered_requests_per_s,
            saturated_sessions_per_s=most,
            saturated_tokens_per_s=saturation.output_tokens_per_s.value or 0.0,
            last_sustained=(last := self._last_sustained()),
            is_saturated=last is None or last < 0.999 * most * CURVE_SHARES[-1],
            slo=self.setup.slo,
            percentile=self.spec.percentile,
        )
        if self.setup.slo is not None and not self.is_interrupted:
            result.met, result.missed = self._search(most)
        result.is_interrupted = self.is_interrupted
        return result

    def _open(self, rate: float) -> LoadSpec:
        return msgspec.structs.replace(self.setup.load, mode="open", rate=rate)

    def _search(self, most: float) -> tuple[float | None, float | None]:
        """Halve down from the saturated rate until one rate is met, then bisect. unit: sessions/s"""
        met: float | None = None
        missed: float | None = None
        rate = most * 0.8
        for _ in range(self.spec.max_steps):
            is_met = self._try(rate)
            if self.is_interrupted:
                break
            met, missed = (rate, missed) if is_met else (met, rate)
            if met is not None and missed is not None:
                if missed / met < 1 + self.spec.precision:
                    break
                rate = math.sqrt(met * missed)
            else:
                rate = rate * 1.25 if is_met else rate / 2
        return met, missed

    def _try(self, rate: float) -> bool:
        assert self.setup.slo is not None
        watch = SloWatch(self.setup.slo, self.spec)
        self._run("search", self._open(rate), watch)
        return watch.is_met is True

    def _run(self, purpose: str, load: LoadSpec, watch: SloWatch | None) -> Summary:
        num = self.spec.curve_requests
        if purpose == "saturation":
            num = max(num, 8 * self.spec.saturating_concurrency)  # or its ramp and drain would count as capacity
        if watch:
            num = max(self.spec.max_requests, math.ceil(1.5 * load.rate * self.spec.min_duration))
        workload = msgspec.structs.replace(self.setup.workload, num_requests=num, block=self.num_runs)
        if purpose == "saturation":
            workload = msgspec.structs.replace(workload, think_time=0.0)  # pauses between turns leave a server idle
        setup = msgspec.structs.replace(self.setup, workload=workload, load=load)
        self.num_runs += 1
        title = purpose if load.mode == "closed" else f"{purpose} {load.rate:.3g}/s"
        shown = self.report(title)

        def take(record: Record) -> bool:
            if shown is not None:
                shown(record)
            return watch is not None and watch.take(record)

        try:
            outcome = execute(self.pool, self.endpoint, setup, self.maker, take)
        except KeyboardInterrupt:
            self.is_interrupted = True
            if self.first is None:
                raise
            return self.first.summary
        self.first = self.first or outcome
        self.is_interrupted = self.is_interrupted or outcome.is_interrupted
        self.points.append(self._point(purpose, load, outcome, watch))
        return outcome.summary

    def _point(self, purpose: str, load: LoadSpec, outcome: Outcome, watch: SloWatch | None) -> RatePoint:
        slo = self.setup.slo
        relevant = [record for record in outcome.records if counts_for_latency(record)]
        num_sessions = len({record.session for record in outcome.records})
        return RatePoint(
            rate=load.rate if load.mode == "open" else sessions_per_s(outcome, num_sessions),
            num_sessions=num_sessions,
            purpose=purpose,
            num_requests=len(outcome.records),
            num_over=sum(not meets(record, slo) for record in relevant) if slo else 0,
            is_met=watch.is_met if watch else None,
            invalid=outcome.invalid,
            summary=outcome.summary,
        )

    def _last_sustained(self) -> float | None:
        """The highest rate of the curve whose requests were completed as fast as they came."""
        return max((p.rate for p in self.points if p.purpose == "curve" and _keeps_up(p.summary)), default=None)


def _keeps_up(summary: Summary) -> bool:
    """What the client itself gave up was not asked of the server to its end."""
    given_up = sum(summary.outcomes.get(name, 0) for name in ("cancelled", "superseded"))
    offered = summary.offered_requests_per_s * (1 - given_up / summary.num_requests)
    return (summary.requests_per_s.value or 0.0) >= KEEPS_UP * offered


def sessions_per_s(outcome: Outcome, num_sessions: int) -> float:
    """Of a closed loop: its requests/s, divided by the finished requests of a session."""
    rate = outcome.summary.requests_per_s.value or outcome.summary.offered_requests_per_s
    return rate * num_sessions / max(1, outcome.summary.outcomes.get("ok", 0))
