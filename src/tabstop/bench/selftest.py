"""The tool measured by itself, against the golden server in another process: clocks, accounts, false verdicts, power.

What it claims: arrival times right to 0.5 ms (median) and 5 ms (p99) at 500 streams of 4 tokens a second; every token
counted; at most 15 false verdicts in 200 A/A comparisons per metric; a 10 % slow-down found in at least 90 %.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec
import numpy as np

from tabstop.bench.client import Endpoint, request_id
from tabstop.bench.compare import Arm, CompareSpec, Comparison, compare, is_higher_better, segment_metrics
from tabstop.bench.dialects import DIALECTS, Sampling
from tabstop.bench.golden import MODEL, Behaviour, Told, golden_tokenizer
from tabstop.bench.records import Record, Session, Turn
from tabstop.bench.run import LoadSpec, RunSetup
from tabstop.bench.statistics import Floats, MetricBlocks, judge, percentile
from tabstop.bench.tokens import LocalTokenizer, resolve
from tabstop.bench.workers import LoadPlan, RunResult, WorkerPool
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.prompts import IdMaker

MEDIAN_LIMIT, P99_LIMIT = 0.0005, 0.005  # seconds
FALSE_LIMIT, POWER_LIMIT = 15 / 200, 0.9
SLOW_DOWN = 1.1
Finished = TypeVar("Finished", RunResult, Comparison)
DRIFT = 0.1  # added to recorded noise: ± 10 %
NUM_BLOCKS, NUM_AA_BLOCKS = 10, 5


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the self-test."""

    name: str
    measured: str
    limit: str
    passed: bool


class NoiseRecording(msgspec.Struct, frozen=True, kw_only=True):
    """Metrics of consecutive segments of one endpoint, as sockets gave them. shape of values: (num_segments,)"""

    metrics: dict[str, list[float]]
    where: str = ""

    @property
    def num_segments(self) -> int:
        return min(len(values) for values in self.metrics.values())


@contextmanager
def golden_process(behaviour: Behaviour) -> Iterator[str]:
    """A golden server in a process of its own; yields its URL."""
    told = msgspec.json.encode(behaviour).decode()
    command = [sys.executable, "-m", "tabstop.bench.golden", "--behaviour", told]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def golden_endpoint(url: str, dialect: str = "openai-completions", **behaviour: object) -> Endpoint:
    """An endpoint that asks for a behaviour by headers."""
    headers = {"x-golden-" + name.replace("_", "-"): str(value) for name, value in behaviour.items()}
    model = MODEL if dialect.startswith("openai") else ""
    return Endpoint(url=url, dialect=dialect, sampling=Sampling(model=model), headers=headers, timeout=60.0)


def truth(url: str) -> dict[str, Told]:
    """What the server says it sent, by request."""
    with urllib.request.urlopen(url + "/golden/log") as response:
        told = msgspec.json.decode(response.read(), type=list[Told])
    return {one.request: one for one in told}


# ------------------------------------------------------------------------------------------------- clocks, accounts


def check_clocks(pool: WorkerPool, num_streams: int = 500, rate: float = 4.0, seconds: float = 20.0) -> list[Check]:
    """Client stamps against the server's own send times, both on the machine's monotonic clock."""
    num_tokens = max(2, round(rate * seconds))
    with golden_process(Behaviour(ttft=0.3, rate=rate)) as url:
        rng = np.random.default_rng(0)
        starts = np.sort(rng.uniform(0, 2.0, num_streams))
        sessions = [
            Session(index=i, start=float(t), turns=[Turn(ids=[i, *range(2000, 2020)], max_tokens=num_tokens)])
            for i, t in enumerate(starts)
        ]
        result = _whole(pool.run(LoadPlan(endpoint=golden_endpoint(url), sessions=sessions)))
        told = truth(url)
    first, arrival, gap = clock_errors(result, told)
    titles = {"first token": first, "every token": arrival, "time between tokens": gap}
    checks = []
    for title, errors in titles.items():
        p50, p99 = percentile(errors, 0.5), percentile(errors, 0.99)
        checks.append(
            Check(
                name=f"clock: {title}, {num_streams} streams of {rate:g} tokens/s",
                measured=f"median {1e3 * p50:.3f} ms, p99 {1e3 * p99:.3f} ms, n = {len(errors)}",
                limit=f"median {1e3 * MEDIAN_LIMIT:g} ms, p99 {1e3 * P99_LIMIT:g} ms",
                passed=p50 <= MEDIAN_LIMIT and p99 <= P99_LIMIT and len(result.records) == num_streams,
            )
        )
    return checks


def _whole(result: Finished) -> Finished:
    """Runs and comparisons keep what they have on Ctrl-C; a self-test has no use for a part and ends."""
    if result.is_interrupted:
        raise KeyboardInterrupt
    return result


def clock_errors(result: RunResult, told: dict[str, Told]) -> tuple[Floats, Floats, Floats]:
    """Absolute errors of the first arrivals, of all arrivals, and of the gaps. unit: seconds"""
    first, arrivals, gaps = [], [], []
    for record in result.records:
        sent = np.array([one.at for one in told[request_id(record)].sent])
        seen = np.array([chunk.at for chunk in record.chunks]) + result.start
        if len(sent) == len(seen) and len(sent):
            arrivals.append(np.abs(seen - sent))
            gaps.append(np.abs(np.diff(seen) - np.diff(sent)))
            first.append(arrivals[-1][0])
    return np.array(first), np.concatenate(arrivals), np.concatenate(gaps)


def check_accounts(pool: WorkerPool, num_each: int = 50) -> list[Check]:
    """Every dialect with every style of chunk, usage told or withheld, and mid-stream faults: all counts exact."""
    wrong: list[str] = []
    num_streams = num_faults = 0
    with golden_process(Behaviour(ttft=0.01, rate=500, style="mixed")) as url:
        cases: list[tuple[str, dict[str, object]]] = [(dialect, {}) for dialect in DIALECTS]
        cases += [
            ("openai-completions", {"usage": False, "running_usage": False}),
            ("openai-completions", {"running_usage": False}),
        ]
        cases += [
            ("openai-completions", {"fault": fault, "fault_share": 0.5}) for fault in ("error-event", "cut", "garbage")
        ]
        for number, (dialect, behaviour) in enumerate(cases):
            sessions = [
                Session(index=1000 * number + i, start=0.002 * i, turns=[Turn(text=f" a b c{i}", max_tokens=20)])
                for i in range(num_each)
            ]
            result = _whole(pool.run(LoadPlan(endpoint=golden_endpoint(url, dialect, **behaviour), sessions=sessions)))
            tokenizer = LocalTokenizer(golden_tokenizer()) if behaviour.get("running_usage") is False else None
            wrong += wrong_accounts(result.records, truth(url), tokenizer)
            num_streams += len(result.records)
            num_faults += sum(record.outcome == "error" for record in result.records)
    expected = num_each * len(cases)
    return [
        Check(
            name="accounts: text, tokens per chunk, usage and faults of every stream",
            measured=f"{len(wrong)} wrong of {num_streams} streams ({num_faults} with mid-stream errors)",
            limit="0 wrong",
            passed=not wrong and num_streams == expected and num_faults > 0,
        )
    ]


def wrong_accounts(
    records: Sequence[Record], told: dict[str, Told], tokenizer: LocalTokenizer | None = None
) -> list[str]:
    """One line for each record whose text, chunks, token counts or outcome differ from the truth."""
    wrong = []
    for record in records:
        resolve(record, tokenizer)
        true = told[request_id(record)]
        seen = [(c.num_tokens, c.num_chars) for c in record.chunks]
        sent = [(s.num_tokens, s.num_chars) for s in true.sent]
        if seen != sent or record.text != true.text or true.is_whole != (record.outcome == "ok"):
            wrong.append(f"{record.session}: {record.outcome} {record.error} {seen} {sent}")
        elif record.outcome == "ok" and record.prompt_tokens not in (None, true.prompt_tokens):
            wrong.append(f"{record.session}: prompt {record.prompt_tokens} is {true.prompt_tokens}")
    return wrong


# -------------------------------------------------------------------------------------------------- verdicts, power


def compare_golden(pool: WorkerPool, url: str, slow_down: float, seed: int, num_requests: int = 32) -> Comparison:
    """The real comparison of a golden server with itself, the second time slowed down."""
    workload = WorkloadSpec(num_requests=num_requests, input_tokens="16", output_tokens="8", seed=seed)
    setup = RunSetup(workload=workload, load=LoadSpec(concurrency=8))
    arms = [
        Arm(label="A", maker=IdMaker(), enter=lambda: golden_endpoint(url), salt=0),
        Arm(label="B", maker=IdMaker(), enter=lambda: golden_endpoint(url, slow_down=slow_down), salt=1),
    ]
    return compare(pool, arms, setup, CompareSpec(num_blocks=NUM_BLOCKS, num_aa_blocks=NUM_AA_BLOCKS, seed=seed))


def socket_verdicts(
    pool: WorkerPool, slow_down: float, num_repeats: int, say: Callable[[str], None]
) -> tuple[dict[str, int], int, NoiseRecording]:
    """How often each metric was called different, how often verdicts were withheld, and the baseline's segments."""
    found: dict[str, int] = {}
    num_withheld = 0
    recording: dict[str, list[float]] = {}
    with golden_process(Behaviour(ttft=0.03, rate=400, jitter=0.05)) as url:
        for repeat in range(num_repeats):
            comparison = _whole(compare_golden(pool, url, slow_down, seed=repeat))
            pair = comparison.pairs[0]
            num_withheld += bool(pair.refused)
            for judgement in pair.judgements:
                different = judgement.verdict in ("faster", "slower")
                found[judgement.metric] = found.get(judgement.metric, 0) + different
            for values in segments_of(comparison):
                for metric, value in values.items():
                    recording.setdefault(metric, []).append(value)
            say(f"sockets, slow-down {slow_down:g}: {repeat + 1}/{num_repeats}, {sum(found.values())} differences")
    return found, num_withheld, NoiseRecording(metrics=recording)


def segments_of(comparison: Comparison) -> list[dict[str, float]]:
    """Each baseline segment's metrics, in order of time."""
    segments: dict[int, list[Record]] = {}
    for record in comparison.outcomes[0].records:
        segments.setdefault(record.session // 1_000_000, []).append(record)
    return [segment_metrics([records], RunSetup()) for _, records in sorted(segments.items())]


def noise_verdicts(recording: NoiseRecording, slow_down: float, num_repeats: int) -> dict[str, int]:
    """The verdict logic on pieces of recorded noise with an added drift, in the design of a real comparison."""
    names = sorted(recording.metrics)
    table = np.array([recording.metrics[name][: recording.num_segments] for name in names]).T
    found = dict.fromkeys(names, 0)
    for repeat in range(num_repeats):
        rng = np.random.default_rng([repeat, 6])
        num_segments = 4 * (NUM_BLOCKS + NUM_AA_BLOCKS)
        start = int(rng.integers(len(table)))
        piece = np.take(table, range(start, start + num_segments), axis=0, mode="wrap")
        phase = np.linspace(0, 1, num_segments) * rng.uniform(0.5, 3) + rng.uniform()
        drift = np.exp(DRIFT * np.sin(2 * np.pi * phase))[:, None]
        signs = np.array([-1.0 if is_higher_better(name) else 1.0 for name in names])
        for judgement in judge(_blocks(piece * drift**signs, names, slow_down, rng), seed=repeat):
            found[judgement.metric] += judgement.verdict in ("faster", "slower")
    return found


def _blocks(segments: Floats, names: list[str], slow_down: float, rng: np.random.Generator) -> list[MetricBlocks]:
    """Segments in order of time → ABBA blocks per metric, the candidate slowed down."""
    baseline, candidate = [], []
    for block in np.split(segments, len(segments) // 4):
        is_candidate = np.array([0, 1, 1, 0] if rng.random() < 0.5 else [1, 0, 0, 1], dtype=bool)
        baseline.append(block[~is_candidate].mean(axis=0))
        candidate.append(block[is_candidate].mean(axis=0))
    first, second = np.array(baseline).T, np.array(candidate).T
    return [
        MetricBlocks(
            name,
            is_higher_better(name),
            list(first[m, :NUM_BLOCKS]),
            list(second[m, :NUM_BLOCKS] * (1 / slow_down if is_higher_better(name) else slow_down)),
            list(first[m, NUM_BLOCKS:]),
            list(second[m, NUM_BLOCKS:]),
        )
        for m, name in enumerate(names)
    ]


class SelfTestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How long the self-test takes."""

    num_streams: int = 500
    seconds: float = 20.0
    socket_repeats: int = 40
    noise_repeats: int = 160
    socket_power_repeats: int = 20
    noise_power_repeats: int = 180


class SelfTestResult(msgspec.Struct, kw_only=True):
    checks: list[Check]
    recording: NoiseRecording
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def selftest(spec: SelfTestSpec, num_workers: int, say: Callable[[str], None]) -> SelfTestResult:
    """All four parts. `say` hears what goes on."""
    began = time.monotonic()
    with WorkerPool(num_workers) as pool:
        say("clocks")
        checks = check_clocks(pool, spec.num_streams, 4.0, spec.seconds)
        say("accounts")
        checks += check_accounts(pool)
        false_sockets, num_withheld, recording = socket_verdicts(pool, 1.0, spec.socket_repeats, say)
        say("A/A on recorded noise with drift")
        false_noise = noise_verdicts(recording, 1.0, spec.noise_repeats)
        num_false = spec.socket_repeats + spec.noise_repeats
        for metric in sorted(false_sockets):
            by_sockets, total = false_sockets[metric], false_sockets[metric] + false_noise.get(metric, 0)
            told = f"{total} false of {num_false} ({by_sockets} of {spec.socket_repeats} by sockets)"
            limit = FALSE_LIMIT * num_false
            checks.append(Check(name=f"A/A: {metric}", measured=told, limit=f"{limit:g}", passed=total <= limit))
        checks.append(_withheld("A/A", num_withheld, spec.socket_repeats))
        found_sockets, num_withheld, _ = socket_verdicts(pool, SLOW_DOWN, spec.socket_power_repeats, say)
    say("power on recorded noise with drift")
    found_noise = noise_verdicts(recording, SLOW_DOWN, spec.noise_power_repeats)
    num_power = spec.socket_power_repeats + spec.noise_power_repeats
    for metric in sorted(found_sockets):
        by_sockets, total = found_sockets[metric], found_sockets[metric] + found_noise.get(metric, 0)
        told = f"{total} found of {num_power} ({by_sockets} of {spec.socket_power_repeats} by sockets)"
        limit = POWER_LIMIT * num_power
        checks.append(Check(name=f"10 % slower: {metric}", measured=told, limit=f"{limit:g}", passed=total >= limit))
    checks.append(_withheld("10 % slower", num_withheld, spec.socket_power_repeats))
    return SelfTestResult(checks=checks, recording=recording, seconds=time.monotonic() - began)


def _withheld(title: str, num_withheld: int, num_repeats: int) -> Check:
    """Comparisons that gave no verdict because A differed from itself: allowed as often as any false alarm."""
    limit = max(1.0, 0.1 * num_repeats)
    told = f"{num_withheld} of {num_repeats} comparisons by sockets gave no verdict"
    return Check(name=f"{title}: withheld", measured=told, limit=f"{limit:g}", passed=num_withheld <= limit)
