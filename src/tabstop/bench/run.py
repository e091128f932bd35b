"""One measured run: schedule, warm-up, load, token counts, and whether the client itself was the bottleneck.

Puts the parts together; prints nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from tabstop.bench.arrivals import arrivals
from tabstop.bench.client import Endpoint
from tabstop.bench.energy import start_metering
from tabstop.bench.metrics import Slo, Summary, is_failure, summarize, ttft
from tabstop.bench.probe import ServerFacts
from tabstop.bench.records import ClientHealth, Record, Session
from tabstop.bench.statistics import percentile
from tabstop.bench.tokens import LocalTokenizer, RemoteCounter, resolve
from tabstop.bench.workers import LoadPlan, RunResult, WorkerPool
from tabstop.bench.workloads import WorkloadSpec, make_sessions
from tabstop.bench.workloads.prompts import IdMaker, LooseMaker, PromptMaker, TextMaker
from tabstop.errors import ConfigError, InputError

MAX_CPU_SHARE = 0.8  # of one core, per worker
LAG_LIMITS = ((0.5, 0.001, 0.01), (0.99, 0.005, 0.05))  # (percentile, at least so many seconds, share of median TTFT)
MAX_VERIFIED = 500  # answers of one run
MIN_FOR_MEDIAN = 30  # requests
Report = Callable[[Record], bool | None]


class LoadSpec(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """When requests are sent."""

    mode: Literal["closed", "open", "replay"] = "closed"
    concurrency: int = 8  # closed loop
    ramp: float = 0.0  # closed loop: slots start evenly over this time. unit: seconds
    rest: float = 0.0  # closed loop: mean think time of a slot between sessions (exponential). unit: seconds
    process: str = "poisson"  # open loop: constant | poisson | gamma
    rate: float = 1.0  # open loop: sessions a second
    shape: float = 1.0  # gamma
    duration: float | None = None  # nothing new is sent after it. unit: seconds


class Tokenization(msgspec.Struct, frozen=True, kw_only=True):
    """How prompts become tokens and answers are counted."""

    form: Literal["auto", "ids", "text"] = "auto"
    tokenizer: Path | None = None
    num_ids: int = 30_000


class RunSetup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides a run but the endpoint."""

    workload: WorkloadSpec = WorkloadSpec()
    load: LoadSpec = LoadSpec()
    tokens: Tokenization = Tokenization()
    slo: Slo | None = None
    warm_up: float = 0.0  # cut from the start of the window. unit: seconds
    warm_up_requests: int = 4  # sent before, with prompts of their own
    max_lag: float | None = None  # the client's p99 lag that makes a run invalid. unit: seconds


class Outcome(msgspec.Struct, kw_only=True):
    """A finished (or interrupted) run."""

    records: list[Record]
    summary: Summary
    health: list[ClientHealth]
    invalid: list[str]  # why the client, not the server, may have been measured
    lag_p50: float
    lag_p99: float
    is_interrupted: bool = False
    is_stopped: bool = False
    joules: float | None = None  # of this machine's cards during the run
    energy_note: str = ""  # why there are none


def make_maker(
    endpoint: Endpoint, facts: ServerFacts, tokens: Tokenization, counter: Callable[[str], int] | None
) -> PromptMaker:
    """Ids where the endpoint takes them, else text that `counter` counts, else text of about the right length."""
    if tokens.form == "ids" and not facts.takes_ids:
        raise ConfigError(f"{endpoint.url} does not take token ids as a prompt; use --prompt-form text")
    if tokens.form != "text" and facts.takes_ids:
        return IdMaker(tokens.num_ids)
    return TextMaker(counter, facts.num_added) if counter else LooseMaker()


def counter_for(endpoint: Endpoint, tokens: Tokenization) -> Callable[[str], int] | None:
    """Text → number of tokens: the local tokenizer, else the server's own, else None."""
    if tokens.tokenizer is not None:
        return LocalTokenizer.load(tokens.tokenizer).count
    try:
        return RemoteCounter(endpoint.url, endpoint.headers)
    except InputError:
        return None


def schedule(sessions: list[Session], load: LoadSpec, workload: WorkloadSpec) -> list[Session]:
    """Sessions with their send times (open loop); a trace brings its own."""
    if load.mode == "closed":
        return [msgspec.structs.replace(session, start=None) for session in sessions]
    if load.mode == "replay":
        if any(session.start is None for session in sessions):
            raise ConfigError("only the trace workload has send times of its own: use --workload trace, or --rate")
        return sessions
    rng = np.random.default_rng([workload.seed, workload.block, 3])
    offsets = arrivals(load.process, load.rate, len(sessions), rng, load.shape)
    return [msgspec.structs.replace(s, start=float(t)) for s, t in zip(sessions, offsets, strict=True)]


def plan_run(endpoint: Endpoint, setup: RunSetup, maker: PromptMaker) -> LoadPlan:
    sessions = schedule(make_sessions(setup.workload, maker), setup.load, setup.workload)
    is_closed = setup.load.mode == "closed"
    return LoadPlan(
        endpoint=endpoint,
        sessions=sessions,
        concurrency=setup.load.concurrency if is_closed else None,
        ramp=setup.load.ramp,
        rest=setup.load.rest if is_closed else 0.0,
        seed=setup.workload.seed,
        duration=setup.load.duration,
    )


def warm_up(pool: WorkerPool, endpoint: Endpoint, setup: RunSetup, maker: PromptMaker) -> None:
    """Asks a few requests whose prompts no measured run uses. Raises KeyboardInterrupt if that came meanwhile."""
    if setup.warm_up_requests:
        spec = msgspec.structs.replace(setup.workload, num_requests=setup.warm_up_requests, salt=10**6, cancel_rate=0.0)
        load = LoadSpec(concurrency=max(1, setup.warm_up_requests // 2))
        result = pool.run(plan_run(endpoint, msgspec.structs.replace(setup, workload=spec, load=load), maker))
        if result.is_interrupted:
            raise KeyboardInterrupt


def execute(
    pool: WorkerPool, endpoint: Endpoint, setup: RunSetup, maker: PromptMaker, report: Report | None = None
) -> Outcome:
    """The measured part. Raises InputError if not one request was completed."""
    plan = plan_run(endpoint, setup, maker)
    joules_used, energy_note = start_metering(endpoint.url)
    result = pool.run(plan, report)
    joules = joules_used()
    if isinstance(maker, TextMaker) and not result.is_interrupted:
        try:
            verify(result.records, maker.counter)
        except KeyboardInterrupt:
            result.is_interrupted = True
    outcome = conclude(result, setup)
    outcome.joules, outcome.energy_note = joules, energy_note
    return outcome


def verify(records: Sequence[Record], count: Callable[[str], int]) -> None:
    """Re-tokenises a sample of the answers whose server reports no usage. Answers are left unverified if that fails."""
    silent = [r for r in records if r.outcome == "ok" and r.completion_tokens is None and r.text]
    for record in silent[:: -(-len(silent) // MAX_VERIFIED) or 1]:
        try:
            record.retokenized_tokens = count(record.text)
        except InputError:
            return


def conclude(result: RunResult, setup: RunSetup) -> Outcome:
    """Counts tokens, summarises, and judges the client. Raises KeyboardInterrupt if that came before any record."""
    if not result.records and result.is_interrupted:
        raise KeyboardInterrupt
    if not result.records:
        raise InputError("nothing was measured: no request ended before the run did")
    tokenizer = LocalTokenizer.load(setup.tokens.tokenizer) if setup.tokens.tokenizer else None
    for record in result.records:
        resolve(record, tokenizer)
    lags = [record.lag for record in result.records]
    return Outcome(
        records=result.records,
        summary=summarize(result.records, setup.slo, setup.warm_up),
        health=result.health,
        invalid=client_faults(result.records, result.health, setup.max_lag),
        lag_p50=percentile(lags, 0.5),
        lag_p99=percentile(lags, 0.99),
        is_interrupted=result.is_interrupted,
        is_stopped=result.is_stopped,
    )


def client_faults(records: Sequence[Record], health: Sequence[ClientHealth], max_lag: float | None = None) -> list[str]:
    """Reasons why the client was the bottleneck; empty for a valid run.

    The median lag may be 1 % of the median TTFT (at least 1 ms), the p99 5 % (at least 5 ms). A given p99 limit is the
    only one.
    """
    faults = []
    first_tokens = [ttft(r, from_sent=True) for r in records if r.chunks and not is_failure(r)]
    typical = percentile(first_tokens, 0.5) if first_tokens else 0.0
    for q, least, share in LAG_LIMITS:
        if q == 0.5 and (len(records) < MIN_FOR_MEDIAN or max_lag is not None):
            continue  # connecting the first of few requests would decide it
        limit = max_lag if max_lag is not None else max(least, share * typical)
        lag = percentile([record.lag for record in records], q)
        if lag > limit:
            faults.append(
                f"the client sent late: p{100 * q:g} lag {1e3 * lag:.2f} ms, limit {1e3 * limit:.2f} ms; give it more "
                "--workers, a quieter machine, or less load"
            )
    for worker in health:
        if worker.cpu_share > MAX_CPU_SHARE:
            faults.append(
                f"client worker {worker.worker} used {100 * worker.cpu_share:.0f} % of a core, "
                f"limit {100 * MAX_CPU_SHARE:.0f} %; give it more --workers"
            )
    return faults
