"""The report as versioned data: what is written as JSON, and what every other form is made from.

Schema "tabstop-bench-report/1" is these structs; docs/benchmarking.md describes it. Fields are only added within a
version. Knows no layout; prompts, answers and keys are never in it.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from tabstop.bench.client import Endpoint
from tabstop.bench.compare import Comparison, Pair
from tabstop.bench.dialects import UNREADABLE
from tabstop.bench.metrics import Summary, Window, latency_samples
from tabstop.bench.probe import ServerFacts
from tabstop.bench.records import ClientHealth, Record
from tabstop.bench.run import Outcome, RunSetup
from tabstop.bench.statistics import Judgement
from tabstop.bench.sweep import SweepResult
from tabstop.errors import InputError

SCHEMA = "tabstop-bench-report/1"
NUM_CURVE_POINTS = 101
MAX_TIMELINE_BINS = 120
SECRET_HEADERS = ("auth", "key", "token", "cookie", "secret")  # parts of their names
SECRET_OPTIONS = re.compile(r"(--[\w-]*(?:api[-_]?key|secret|password|token)[= ]+)[^\s'\"]+")  # of a started server


class Timeline(msgspec.Struct, frozen=True):
    """Bins of equal length over the run. unit: seconds, tokens/s, requests, seconds"""

    bin_length: float
    output_tokens_per_s: list[float]
    in_flight: list[float]
    ttft_p50: list[float | None]


class SanityFlag(msgspec.Struct, frozen=True):
    """Something that cannot be true, with the arithmetic that shows it."""

    what: str
    claim: str
    limit: str
    why: str


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint as it is reported: no secrets."""

    url: str
    dialect: str
    model: str
    label: str = ""
    start_command: str | None = None
    facts: ServerFacts = msgspec.field(default_factory=ServerFacts)


class RunSection(msgspec.Struct, kw_only=True):
    """One endpoint's run (or all its segments of a comparison)."""

    label: str
    endpoint: Endpoints
    summary: Summary
    health: list[ClientHealth]
    lag_p50: float  # seconds
    lag_p99: float
    invalid: list[str]
    is_interrupted: bool = False
    sanity: list[SanityFlag] = []
    joules: float | None = None
    energy_note: str = ""  # why there are none
    distributions: dict[str, list[float | None]] = {}  # latency → its 0th … 100th percentile; None = infinite
    timeline: Timeline | None = None


class ComparisonSection(msgspec.Struct, kw_only=True):
    pairs: list[Pair]
    aa: list[Judgement]
    order: list[list[int]]


class BenchReport(msgspec.Struct, kw_only=True):
    """A whole report."""

    schema: str = SCHEMA
    kind: Literal["run", "compare", "sweep"]
    created: str
    command: list[str]
    environment: dict[str, Any]
    setup: RunSetup
    runs: list[RunSection]
    comparison: ComparisonSection | None = None
    sweep: SweepResult | None = None

    @property
    def is_valid(self) -> bool:
        return not any(run.invalid for run in self.runs)


class _Versioned(msgspec.Struct):
    """What a report of any version says first."""

    schema: str


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def describe_endpoint(endpoint: Endpoint, facts: ServerFacts, start_command: str | None = None) -> Endpoints:
    return Endpoints(
        url=endpoint.url,
        dialect=endpoint.dialect,
        model=endpoint.sampling.model,
        label=endpoint.label,
        start_command=SECRET_OPTIONS.sub(r"\1…", start_command) if start_command else None,
        facts=facts,
    )


def redacted(command: Sequence[str]) -> list[str]:
    """The command line without the values of secret headers and of started servers' keys, and as proper UTF-8."""
    kept = []
    for number, word in enumerate(command):
        name, colon, _ = word.partition(":")
        is_header = colon and (word.startswith("--header=") or command[max(0, number - 1)] == "--header")
        is_secret = is_header and any(part in name.lower() for part in SECRET_HEADERS)
        shown = f"{name}: …" if is_secret else SECRET_OPTIONS.sub(r"\1…", word)
        kept.append(shown.encode("utf-8", "replace").decode())
    return kept


def make_section(outcome: Outcome, endpoint: Endpoints) -> RunSection:
    return RunSection(
        label=endpoint.label or endpoint.url,
        endpoint=endpoint,
        summary=outcome.summary,
        health=outcome.health,
        lag_p50=outcome.lag_p50,
        lag_p99=outcome.lag_p99,
        invalid=outcome.invalid,
        is_interrupted=outcome.is_interrupted,
        joules=outcome.joules,
        energy_note=outcome.energy_note,
        distributions=distributions(outcome.records, outcome.summary.window),
        timeline=timeline(outcome.records),
    )


def distributions(records: Sequence[Record], window: Window) -> dict[str, list[float | None]]:
    """Every latency's percentiles 0 … 100, from the intended send time."""
    inside = [r for r in records if window.start <= r.intended <= window.end]
    levels = np.linspace(0, 1, NUM_CURVE_POINTS)
    curves: dict[str, list[float | None]] = {}
    for name, values in latency_samples(inside, from_sent=False).items():
        points = np.quantile(values, levels, method="inverted_cdf")
        curves[name] = [round(float(p), 6) if np.isfinite(p) else None for p in points]
    return curves


def timeline(records: Sequence[Record]) -> Timeline | None:
    """What happened when, in at most 120 bins."""
    end = max((record.ended for record in records), default=0.0)
    if end <= 0:
        return None
    bin_length = max(0.1, end / MAX_TIMELINE_BINS)
    num_bins = int(np.ceil(end / bin_length))
    edges = np.arange(num_bins + 1) * bin_length
    pairs = [(c.at, max(0, c.num_tokens)) for record in records for c in record.chunks]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    tokens, _ = np.histogram(table[:, 0], bins=edges, weights=table[:, 1])
    in_flight = np.zeros(num_bins)
    first_tokens: list[list[float]] = [[] for _ in range(num_bins)]
    for record in records:
        low, high = int(max(0.0, record.sent) / bin_length), int(max(0.0, record.ended) / bin_length)
        for index in range(low, min(high, num_bins - 1) + 1):
            overlap = min(record.ended, edges[index + 1]) - max(record.sent, edges[index])
            in_flight[index] += max(0.0, overlap) / bin_length
        if record.chunks and not record.is_whole and low < num_bins:
            first_tokens[low].append(record.chunks[0].at - record.intended)
    return Timeline(
        bin_length=bin_length,
        output_tokens_per_s=[round(float(x) / bin_length, 3) for x in tokens],
        in_flight=[round(float(x), 3) for x in in_flight],
        ttft_p50=[round(float(np.median(values)), 6) if values else None for values in first_tokens],
    )


def comparison_section(comparison: Comparison) -> ComparisonSection:
    return ComparisonSection(pairs=comparison.pairs, aa=comparison.aa_judgements, order=comparison.order)


def write_report(report: BenchReport, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str), indent=1))


def read_report(path: Path) -> BenchReport:
    """Raises InputError for a file that is missing or no report of this version."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the report {path}: {error.strerror}") from None
    try:
        schema = msgspec.json.decode(content, type=_Versioned).schema
        if schema != SCHEMA:
            raise InputError(f"{path} has the schema {schema!r}; this version reads {SCHEMA!r}")
        return msgspec.json.decode(content, type=BenchReport, dec_hook=lambda kind, value: kind(value))
    except UNREADABLE as error:
        raise InputError(f"{path} is not a benchmark report: {error}") from None


def doubts(report: BenchReport) -> list[str]:
    """Why nothing should be built on its numbers, one line each."""
    found = [f"INVALID, {run.label}: {fault}" for run in report.runs for fault in run.invalid]
    return found + [f"{run.label} was interrupted" for run in report.runs if run.is_interrupted]
