"""A report as one HTML page: no script, no network, light and dark, readable from 400 pixels up.

Knows the report's data; the plots are svg.py's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

import msgspec

from tabstop.bench import svg
from tabstop.bench.cost import UTILIZATIONS
from tabstop.bench.export import capacity_line, number, rate_unit, repeat_hint, show_estimate, summary_table
from tabstop.bench.report import BenchReport, RunSection
from tabstop.bench.statistics import Judgement
from tabstop.bench.svg import Axis, Series

TITLES = {"run": "Benchmark run", "compare": "Comparison", "sweep": "Capacity sweep"}
LATENCY_NAMES = {
    "ttft": "Time to first token",
    "itl": "Time between tokens",
    "tpot": "Time per output token",
    "e2e": "End to end",
    "completion": "Whole short completion",
}


def to_html(report: BenchReport, price_per_hour: float | None = None) -> str:
    """The page. `price_per_hour` is of all devices of one endpoint; without it, costs are for each $1 an hour."""
    style = resources.files("tabstop.bench").joinpath("data", "report.css").read_text(encoding="utf-8")
    title = f"{TITLES[report.kind]}, {report.created[:16].replace('T', ' ')} UTC"
    sections = [
        _header(report, title),
        _notices(report),
        _cards(report),
        *_comparison(report),
        *_sweep(report),
        _section(
            "Summary",
            _table(summary_table(report)),
            ("Of the run that saturates the server. " if report.sweep else "")
            + "Percentiles with 95 % order-statistic intervals, from the intended send time.",
        ),
        _distributions(report),
        _timelines(report),
        _cost(report, price_per_hour),
        _details(report),
        _setup(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head><body><main>'
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _section(title: str, content: str, hint: str = "") -> str:
    told = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>" if content else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_value(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _value(cell: str) -> str:
    """A cell; an interval may go below its number, but neither is broken."""
    number, bracket, interval = cell.partition(" [")
    if not bracket or not interval.endswith("]"):
        return escape(cell)
    return f"<span>{escape(number)}</span> <small>[{escape(interval)}</small>"


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _figures(figures: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _header(report: BenchReport, title: str) -> str:
    badge = '<span class="badge ok">valid</span>' if report.is_valid else '<span class="badge bad">INVALID</span>'
    names = " &middot; ".join(
        f"{escape(run.label)} <small>{escape(run.endpoint.model)} ({escape(run.endpoint.dialect)})</small>"
        for run in report.runs
    )
    return f"<header><h1>{escape(title)} {badge}</h1><p>{names}</p></header>"


def _notices(report: BenchReport) -> str:
    notices = []
    for run in report.runs:
        notices += [("bad", f"INVALID, {run.label}: {fault}") for fault in run.invalid]
        notices += [("bad", f"Cannot be true, {f.what}: {f.claim}; {f.limit} ({f.why})") for f in run.sanity]
        if run.is_interrupted:
            notices.append(("warn", f"{run.label} was interrupted: this is what was measured until then"))
        if run.summary.window.note:
            notices.append(("warn", f"{run.label}: {run.summary.window.note}"))
        tokens = run.summary.tokens
        if tokens.num_output_mismatches or tokens.num_prompt_mismatches:
            counts = f"output in {tokens.num_output_mismatches}, prompt in {tokens.num_prompt_mismatches} requests"
            notices.append(("warn", f"{run.label}: token accounts differ from the server's, {counts}"))
    for pair in report.comparison.pairs if report.comparison else []:
        if pair.refused:
            notices.append(("bad", f"Not comparable, {pair.candidate} against {pair.baseline}: {pair.refused}"))
    return "".join(f'<p class="notice {kind}">{escape(text)}</p>' for kind, text in notices)


def _cards(report: BenchReport) -> str:
    """The four numbers that most readers came for, one column of values an endpoint."""
    wanted = []
    for name, level in (("ttft", "p50"), ("e2e", "p50")):
        values = [
            show_estimate(run.summary.latencies[name].percentiles[level], 1e3).split(" [")[0]
            if name in run.summary.latencies
            else "n/a"
            for run in report.runs
        ]
        wanted.append((f"{LATENCY_NAMES[name]}, {level}", "ms", values))
    wanted.append(
        ("Output", "tokens/s", [show_estimate(run.summary.output_tokens_per_s).split(" [")[0] for run in report.runs])
    )
    if any(run.summary.goodput is not None for run in report.runs):
        wanted.append(("Goodput", "requests/s", [number(run.summary.goodput or 0.0) for run in report.runs]))
    else:
        wanted.append(
            (
                "Finished",
                "requests/s",
                [show_estimate(run.summary.requests_per_s).split(" [")[0] for run in report.runs],
            )
        )
    cards = ""
    for title, unit, values in wanted:
        shown = "".join(f'<b class="t{i % 6}">{escape(value)}</b>' for i, value in enumerate(values))
        values_shown = f'<div class="values">{shown}</div><small>{unit}</small>'
        cards += f'<div class="card"><span>{escape(title)}</span>{values_shown}</div>'
    return f'<div class="cards">{cards}</div>' + (
        svg.legend([run.label for run in report.runs]) if len(report.runs) > 1 else ""
    )


def _comparison(report: BenchReport) -> list[str]:
    if report.comparison is None:
        return []
    sections = []
    for pair in report.comparison.pairs:
        reach = svg.reach_of([ratio for judgement in pair.judgements if (ratio := _ratio(judgement))])
        rows = "".join(_verdict_row(judgement, reach) for judgement in pair.judgements)
        names = ("metric", "verdict", "ratio (95 %)", "", "noise floor", "Holm p", "why")
        header = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
        table = (
            f'<div class="scroll"><table class="verdicts"><thead>{header}</thead><tbody>{rows}</tbody></table></div>'
        )
        gate = [["check", "", "detail"], *([c.name, "equal" if c.passed else "UNEQUAL", c.detail] for c in pair.gate)]
        num_blocks = len(pair.blocks[0].baseline) if pair.blocks else 0
        hint = (
            f"The verdict is that of {pair.candidate}; ratio = {pair.candidate} / {pair.baseline}, over {num_blocks} "
            "blocks in ABBA order; the band is what the baseline does against itself."
        )
        sections.append(_section(f"{pair.candidate} against {pair.baseline}", table, hint))
        sections.append(_section("Equal work", _table(gate), "A verdict needs the same work on both sides."))
    return sections


def _ratio(judgement: Judgement) -> svg.Ratio | None:
    d = judgement.difference
    if d.ratio is None or d.low is None or d.high is None:
        return None
    return svg.Ratio(d.ratio, d.low, d.high, judgement.noise_floor, judgement.verdict)


def _verdict_row(judgement: Judgement, reach: float) -> str:
    bar = ratio = ""
    if (shown := _ratio(judgement)) is not None:
        bar = svg.ratio_bar(shown, reach)
        ratio = f"{shown.value:.3f} [{shown.low:.3f}, {shown.high:.3f}]"
    floor = f"±{100 * judgement.noise_floor:.1f} %" if judgement.noise_floor is not None else ""
    reason = judgement.reason if len(judgement.reason) < 70 else "see above"
    kind = judgement.verdict.replace(" ", "-")
    cells = [
        escape(judgement.metric),
        f'<span class="pill v-{kind}">{judgement.verdict}</span>',
        ratio,
        bar,
        floor,
        f"{judgement.p_holm:.4f}",
        escape(reason),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _sweep(report: BenchReport) -> list[str]:
    sweep = report.sweep
    if sweep is None:
        return []
    points = sorted(
        (p for p in sweep.points if p.purpose != "search"), key=lambda p: (p.purpose == "saturation", p.rate)
    )
    curves = []
    for name, level in (("ttft", "p50"), ("ttft", "p90"), ("e2e", "p50")):
        line = []
        for p in points:
            value = p.summary.latencies[name].percentiles[level].value if name in p.summary.latencies else None
            line.append((p.summary.output_tokens_per_s.value or 0.0, 1e3 * value if value else None))
        curves.append(Series(f"{name} {level}", line, dots=True))
    plot = svg.line_chart("latency against throughput", curves, Axis("output tokens/s", low=0), Axis("ms", log=True))
    plots = _figures([_figure(svg.legend([c.label for c in curves]) + plot, "Latency against throughput")])
    rate_name = f"rate ({rate_unit(sweep)}/s)"
    rows = [[rate_name, "purpose", "requests", "beyond SLO", "SLO met", "TTFT p50 (ms)", "output tokens/s", "valid"]]
    for p in sweep.points:
        met = {True: "yes", False: "no", None: "undecided" if p.purpose == "search" else ""}[p.is_met]
        first = p.summary.latencies["ttft"].percentiles["p50"] if "ttft" in p.summary.latencies else None
        shown = show_estimate(first, 1e3) if first else "n/a"
        rate = show_estimate(p.summary.output_tokens_per_s)
        valid = "no" if p.invalid else "yes"
        rows.append([number(p.rate), p.purpose, str(p.num_requests), str(p.num_over), met, shown, rate, valid])
    return [_section("Capacity", f"<p>{escape(capacity_line(report))}</p>{plots}{_table(rows)}")]


def _distributions(report: BenchReport) -> str:
    figures = []
    for name, title in LATENCY_NAMES.items():
        if name == "completion" and all(r.distributions.get(name) == r.distributions.get("e2e") for r in report.runs):
            continue  # every answer was short
        series = [
            Series(
                run.label,
                [
                    (1e3 * value, float(i))
                    for i, value in enumerate(run.distributions[name])
                    if value is not None and value > 0
                ],
                style=i_run,
            )
            for i_run, run in enumerate(report.runs)
            if run.distributions.get(name)
        ]
        if series and any(len(one.points) > 1 for one in series):
            plot = svg.line_chart(
                title, series, Axis("ms", log=True), Axis("% of requests at or below", low=0, high=100)
            )
            figures.append(_figure(plot, title))
    if not figures:
        return ""
    keys = svg.legend([run.label for run in report.runs])
    hint = "Cumulative distributions; failures are infinite, so a curve that ends below 100 % shows them."
    return _section("Distributions", keys + _figures(figures), hint)


def _timelines(report: BenchReport) -> str:
    figures = []
    runs = [(i, run, run.timeline) for i, run in enumerate(report.runs) if run.timeline is not None]
    for title, field, scale, unit in (
        ("Output over time", "output_tokens_per_s", 1.0, "tokens/s"),
        ("Requests in flight", "in_flight", 1.0, "requests"),
        ("Median time to first token, by send time", "ttft_p50", 1e3, "ms"),
    ):
        series = []
        for i, run, line in runs:
            values: list[Any] = getattr(line, field)
            points = [((n + 0.5) * line.bin_length, None if v is None else scale * v) for n, v in enumerate(values)]
            series.append(Series(run.label, points, style=i))
        if series:
            plot = svg.line_chart(title, series, Axis("s", low=0), Axis(unit, low=0))
            figures.append(_figure(plot, title))
    keys = svg.legend([run.label for run in report.runs])
    return _section("Timeline", keys + _figures(figures) if figures else "")


def _cost(report: BenchReport, price_per_hour: float | None) -> str:
    hourly = price_per_hour if price_per_hour is not None else 1.0
    series = []
    for i, run in enumerate(report.runs):
        rate = run.summary.output_tokens_per_s.value
        if rate:
            whole = 1e6 * hourly / (3600 * rate)
            series.append(Series(run.label, [(100 * u, whole / u) for u in sorted(UTILIZATIONS)], dots=True, style=i))
    if not series:
        return ""
    unit = "$ a million tokens"
    plot = svg.line_chart("cost", series, Axis("utilisation (%)", low=0, high=100), Axis(unit, log=True))
    figure = _figure(svg.legend([s.label for s in series]) + plot, "Cost by utilisation")
    price = f"At ${number(hourly)} an hour" + ("" if price_per_hour is not None else " (no --price was given)")
    hint = f"{price}, all cost on output tokens, at this run's rate: an idle machine costs as much as a busy one."
    return _section("Cost", _figures([figure]), hint)


def _details(report: BenchReport) -> str:
    parts = [_run_details(run) for run in report.runs]
    return _section("Every number", "".join(parts))


def _run_details(run: RunSection) -> str:
    summary = run.summary
    rows = [["latency", *next(iter(summary.latencies.values())).percentiles, "mean"]] if summary.latencies else []
    for clock, latencies in (("from intended send", summary.latencies), ("from real send", summary.service_latencies)):
        for name, latency in latencies.items():
            cells = [show_estimate(e, 1e3) for e in (*latency.percentiles.values(), latency.mean)]
            rows.append([f"{name} (ms), {clock}", *cells])
    facts = [["fact", "value"]]
    facts += [[f"requests: {name}", str(count)] for name, count in summary.outcomes.items()]
    facts += [[f"error: {name}", str(count)] for name, count in summary.errors.items()]
    facts += [[f"finish reason: {name}", str(count)] for name, count in summary.finish_reasons.items()]
    facts += [[f"tokens: {k.replace('_', ' ')}", _cell(v)] for k, v in msgspec.structs.asdict(summary.tokens).items()]
    facts += [[f"prompt tokens: {k}", number(v)] for k, v in summary.prompt_lengths.items()]
    facts += [[f"output tokens: {k}", number(v)] for k, v in summary.output_lengths.items()]
    facts += [["window", f"{summary.window.start:.2f} s to {summary.window.end:.2f} s"]]
    facts += [["client lag p50, p99", f"{1e3 * run.lag_p50:.2f} ms, {1e3 * run.lag_p99:.2f} ms"]]
    facts += [
        [
            f"client worker {h.worker}",
            f"{100 * h.cpu_share:.0f} % of a core, loop lag p99 {1e3 * h.loop_lag_p99:.1f} ms",
        ]
        for h in run.health
    ]
    facts.append(["energy", _energy(run)])
    facts += [[f"server: {path}", _cell(told)[:300]] for path, told in run.endpoint.facts.identity.items()]
    latency_table = _table(rows) if rows else ""
    return f"<details><summary>{escape(run.label)}</summary>{latency_table}{_table(facts)}</details>"


def _energy(run: RunSection) -> str:
    if run.joules is None:
        return f"not measured: {run.energy_note}" if run.energy_note else "not measured"
    per_token = run.joules / max(1, run.summary.tokens.output_counted)
    return f"{number(run.joules)} J of all this machine's cards, {number(per_token)} J/output token"


def _cell(value: Any) -> str:
    if value is None:
        return "not reported"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return str(value)


def _setting(value: Any) -> str:
    return "not set" if value in (None, "") else str(value)


def _setup(report: BenchReport) -> str:
    rows = [["setting", "value"]]
    for name, part in msgspec.structs.asdict(report.setup).items():
        if isinstance(part, msgspec.Struct):
            rows += [[f"{name}.{key}", _setting(value)] for key, value in msgspec.structs.asdict(part).items()]
        else:
            rows.append([name, _setting(part)])
    environment = [["environment", "value"]]
    for name, value in report.environment.items():
        environment.append(
            [name, _cell(value) if not isinstance(value, list) else "; ".join(_cell(v) for v in value) or "none"]
        )
    repeat = f'<p class="hint">{escape(repeat_hint(report))}</p><pre>{escape(shlex.join(report.command))}</pre>'
    return _section(
        "Setup and environment",
        f"{repeat}<details><summary>all settings</summary>{_table(rows)}</details>"
        f"<details><summary>environment</summary>{_table(environment)}</details>",
    )
