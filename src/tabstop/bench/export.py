"""A report as CSV and as a Markdown table. Knows the report's data, nothing of how it was measured."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator

from tabstop.bench.report import BenchReport, RunSection
from tabstop.bench.statistics import Estimate, Judgement
from tabstop.bench.sweep import SweepResult

MILLISECONDS = ("ttft", "itl", "tpot", "e2e", "completion")


def metric_rows(run: RunSection) -> Iterator[tuple[str, str, Estimate, str]]:
    """(metric, statistic, estimate, unit) of everything a run says."""
    summary = run.summary
    for clock, latencies in (("", summary.latencies), (" (from send)", summary.service_latencies)):
        for name, latency in latencies.items():
            for level, estimate in latency.percentiles.items():
                yield name + clock, level, estimate, "s"
            yield name + clock, "mean", latency.mean, "s"
    yield "output tokens/s", "mean", summary.output_tokens_per_s, "tokens/s"
    yield "prompt tokens/s", "mean", summary.prompt_tokens_per_s, "tokens/s"
    yield "requests/s", "mean", summary.requests_per_s, "requests/s"
    if summary.attainment is not None:
        yield "SLO attainment", "share", summary.attainment, ""


def to_csv(report: BenchReport) -> str:
    """One line per endpoint, metric and statistic; empty cells where a value is not estimable."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["endpoint", "metric", "statistic", "value", "low", "high", "n", "unit", "note"])
    for run in report.runs:
        for metric, statistic, e, unit in metric_rows(run):
            writer.writerow([run.label, metric, statistic, e.value, e.low, e.high, e.num_samples, unit, e.note])
    return file.getvalue()


def show_estimate(estimate: Estimate, scale: float = 1.0) -> str:
    """ "12.3 [11.9, 12.8]", or why there is no number."""
    if estimate.value is None:
        return estimate.note.split(":")[0] or "n/a"
    shown = number(estimate.value * scale)
    if estimate.low is None or estimate.high is None:
        return shown
    return f"{shown} [{number(estimate.low * scale)}, {number(estimate.high * scale)}]"


def number(value: float) -> str:
    """Three significant digits and no exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 0.001 else f"{value:.2e}"


def summary_table(report: BenchReport) -> list[list[str]]:
    """Rows of the short table: header first, one column an endpoint."""
    rows = [["metric", *(run.label for run in report.runs)]]
    names = [name for name in MILLISECONDS if any(name in run.summary.latencies for run in report.runs)]
    for name in names:
        for level in ("p50", "p90", "p99"):
            cells = [
                show_estimate(run.summary.latencies[name].percentiles[level], 1e3)
                if name in run.summary.latencies
                else ""
                for run in report.runs
            ]
            rows.append([f"{name} {level} (ms)", *cells])
    rows += [
        ["output tokens/s", *(show_estimate(run.summary.output_tokens_per_s) for run in report.runs)],
        ["requests/s", *(show_estimate(run.summary.requests_per_s) for run in report.runs)],
        ["requests in flight", *(number(run.summary.concurrency) for run in report.runs)],
        ["requests", *(_outcomes(run) for run in report.runs)],
        ["prompt tokens (mean)", *(_length(run.summary.prompt_lengths) for run in report.runs)],
        ["output tokens (mean)", *(_length(run.summary.output_lengths) for run in report.runs)],
        ["tokens counted by", *(_counted_by(run) for run in report.runs)],
        *_energy_row(report),
        ["client lag p99 (ms)", *(number(1e3 * run.lag_p99) for run in report.runs)],
    ]
    if any(run.summary.attainment for run in report.runs):
        rows.append(["SLO attainment", *(_attainment(run) for run in report.runs)])
        rows.append(["goodput (requests/s)", *(number(run.summary.goodput or 0.0) for run in report.runs)])
    return rows


def _outcomes(run: RunSection) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(run.summary.outcomes.items(), key=lambda x: -x[1]))


def _length(lengths: dict[str, float]) -> str:
    return number(lengths["mean"]) if lengths else "n/a"


def _counted_by(run: RunSection) -> str:
    """ "server", or "chunks; 39 of 40 re-tokenised agree"."""
    tokens = run.summary.tokens
    sources = ", ".join(tokens.count_sources)
    if not tokens.num_retokenized:
        return sources
    num_equal = tokens.num_retokenized - tokens.num_retokenized_mismatches
    return f"{sources}; {num_equal} of {tokens.num_retokenized} re-tokenised agree"


def _energy_row(report: BenchReport) -> list[list[str]]:
    if all(run.joules is None for run in report.runs):
        return []
    values = [(run.joules, max(1, run.summary.tokens.output_counted)) for run in report.runs]
    return [["J/output token", *("n/a" if joules is None else number(joules / tokens) for joules, tokens in values)]]


def _attainment(run: RunSection) -> str:
    return show_estimate(run.summary.attainment) if run.summary.attainment else "n/a"


def verdict_table(judgements: list[Judgement]) -> list[list[str]]:
    """Rows of the verdicts: header first."""
    rows = [["metric", "candidate / baseline", "noise floor", "Holm p", "verdict", "why"]]
    for j in judgements:
        d = j.difference
        ratio = "n/a" if d.ratio is None else f"{d.ratio:.3f} [{d.low or 0:.3f}, {d.high or 0:.3f}]"
        floor = "n/a" if j.noise_floor is None else f"±{100 * j.noise_floor:.1f} %"
        reason = j.reason if len(j.reason) < 60 else j.reason[:57] + "…"
        rows.append([j.metric, ratio, floor, f"{j.p_holm:.4f}", j.verdict, reason])
    return rows


def to_markdown(report: BenchReport) -> str:
    """The summary, the verdicts and the warnings."""
    parts = [f"# {report.kind} of {report.created}", _markdown_table(summary_table(report))]
    if report.comparison is not None:
        for pair in report.comparison.pairs:
            parts += [f"## {pair.candidate} against {pair.baseline}", _markdown_table(verdict_table(pair.judgements))]
            parts += [pair.refused] if pair.refused else []
    if report.sweep is not None:
        parts.append(capacity_line(report))
    for run in report.runs:
        parts += [f"INVALID ({run.label}): {fault}" for fault in run.invalid]
        parts += [f"IMPOSSIBLE ({run.label}): {f.what}: {f.claim}; {f.limit} ({f.why})" for f in run.sanity]
    parts.append(f"{repeat_hint(report)}: `{shlex.join(report.command)}`")
    return "\n\n".join(parts) + "\n"


def repeat_hint(report: BenchReport) -> str:
    if any(word.startswith("--seed") for word in report.command):
        return "Repeat with"
    return f"Repeat with (new prompts; --seed {report.setup.workload.seed} asks the same ones again)"


def rate_unit(sweep: SweepResult) -> str:
    """What a sweep's rates count."""
    return "sessions" if any(p.num_requests > p.num_sessions > 0 for p in sweep.points) else "requests"


def capacity_line(report: BenchReport) -> str:
    """What the sweep found, in one sentence."""
    sweep = report.sweep
    assert sweep is not None
    requests, tokens = number(sweep.saturated_requests_per_s), number(sweep.saturated_tokens_per_s)
    unit = f"{rate_unit(sweep)}/s"
    line = f"Saturated at {requests} requests/s, {tokens} tokens/s."
    if unit == "sessions/s" and sweep.saturated_sessions_per_s is not None:
        line += f" That is {number(sweep.saturated_sessions_per_s)} sessions/s."
    if sweep.last_sustained is not None:
        line += f" The highest rate of the curve that was kept up: {number(sweep.last_sustained)} {unit}."
    if not sweep.is_saturated:
        line += " That was its highest: the server was not saturated, raise --saturating-concurrency."
    if sweep.slo is not None:
        low = f"{number(sweep.met)}" if sweep.met is not None else "none found"
        high = f"{number(sweep.missed)}" if sweep.missed is not None else "none found"
        line += (
            f" Largest rate ({unit}) proven to meet the SLO at p{100 * sweep.percentile:g}: {low}; "
            f"smallest not proven: {high}."
        )
    return line


def _markdown_table(rows: list[list[str]]) -> str:
    header, *body = [["" if cell is None else cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])
