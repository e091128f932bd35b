"""`tabstop cost` and `tabstop plan`: what a token costs, how many replicas a trace needs."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tabstop.bench.cost import (
    HOURS_A_MONTH,
    OLD_AFTER,
    CostQuestion,
    book_price,
    cost_figures,
    parse_price,
    read_book,
    utilization_curve,
)
from tabstop.bench.export import number
from tabstop.bench.options import check_number, parse_slo
from tabstop.bench.plan import fit, make_plan
from tabstop.bench.records import read_jsonl
from tabstop.bench.report import BenchReport, doubts, read_report
from tabstop.bench.workloads.trace import Trace, read_trace
from tabstop.errors import ConfigError
from tabstop.exits import fails_in_one_line


@fails_in_one_line
def cost(
    reports: Annotated[list[Path], typer.Argument(help="report.json of runs; four different mixes split the price")],
    price: Annotated[str, typer.Option(help="4.10/gpu-hour or 32.77/hour; wins over the price book")] = "",
    sku: Annotated[str, typer.Option(help="entry of the price book, e.g. h100-80gb")] = "",
    book: Annotated[Path | None, typer.Option(help="another price book (TOML)")] = None,
    devices: Annotated[int, typer.Option(help="devices that the measured server holds, idle ones included")] = 1,
    utilization: Annotated[float, typer.Option(help="share of the capacity that is really used, 0 to 1")] = 0.3,
    acceptance: Annotated[float | None, typer.Option(help="share of completions that users take, 0 to 1")] = None,
    api_price: Annotated[str, typer.Option(help="input=0.5,cached=0.1,output=2: the API's USD a million")] = "",
    tariff: Annotated[float | None, typer.Option(help="USD a kWh")] = None,
) -> None:
    """What a million tokens cost, at capacity and at the utilisation you have."""
    today = datetime.date.today()
    if price:
        paid = parse_price(price, devices, today)
    elif sku:
        paid = book_price(sku, devices, book)
    else:
        known = ", ".join(entry["name"] for entry in read_book(book))
        raise ConfigError(f"give --price, or --sku with one of {known}")
    question = CostQuestion(
        price=paid, utilization=utilization, acceptance=acceptance, api_prices=_api_prices(api_price), tariff=tariff
    )
    measured = [read_report(path) for path in reports]
    figures = cost_figures(measured, question)
    console = Console()
    table = Table("figure", "value", "unit", "source")
    for figure in figures:
        interval = f" [{number(figure.low)}, {number(figure.high or 0.0)}]" if figure.low is not None else ""
        shown = "n/a" if figure.value is None else number(figure.value) + interval
        table.add_row(*map(escape, (figure.name, shown, figure.unit, figure.source)))
    console.print(table, highlight=False)
    curve = ", ".join(f"{100 * share:g} %: ${number(value)}" for share, value in utilization_curve(figures))
    console.print(f"a million output tokens by utilisation: {curve}", highlight=False)
    _warn(console, measured)
    if paid.age(today) > OLD_AFTER:
        console.print(f"[yellow]warning:[/yellow] the price is {paid.age(today)} days old: check it, or give --price")


def _warn(console: Console, reports: list[BenchReport]) -> None:
    for report in reports:
        for doubt in doubts(report):
            console.print(f"[yellow]warning:[/yellow] {escape(doubt)}", highlight=False)


def _api_prices(written: str) -> dict[str, float]:
    prices = {}
    for part in filter(None, written.split(",")):
        kind, _, amount = part.partition("=")
        try:
            prices[kind.strip()] = float(amount)
            if kind.strip() not in ("input", "cached", "output"):
                raise ValueError
        except ValueError:
            raise ConfigError(f"cannot read {part!r} of --api-price; write input=0.5,cached=0.1,output=2") from None
    return prices


@fails_in_one_line
def plan(
    report: Annotated[Path, typer.Option(help="report.json of a run or sweep of one replica")],
    slo: Annotated[str, typer.Option(help="e.g. ttft_p99=0.5,tpot_p99=0.05 (seconds)")],
    trace: Annotated[str, typer.Option(help="azure-code, or a CSV of time, input, output tokens")] = "azure-code",
    speed: Annotated[float, typer.Option(help="2: the trace comes twice as fast")] = 1.0,
    price: Annotated[str, typer.Option(help="of one replica: 4.10/gpu-hour or 32.77/hour")] = "",
    devices: Annotated[int, typer.Option(help="devices of one replica")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the interval's resampling")] = 0,
) -> None:
    """How many replicas a trace needs, by replaying it; refuses what was not measured."""
    limits, level = parse_slo(slo)
    if limits is None or (limits.ttft is None and limits.tpot is None):
        raise ConfigError("--slo must limit ttft or tpot, e.g. ttft_p99=0.5,tpot_p99=0.05")
    check_number("speed", speed, 0.0)
    check_number("seed", seed, 0)
    paid = parse_price(price, devices, datetime.date.today()) if price else None
    measured = read_report(report)
    rows = read_trace(trace)
    rows = Trace(rows.times / speed, rows.inputs, rows.outputs)
    beside = report.parent / "requests.jsonl"
    model = fit(measured, read_jsonl(beside) if beside.is_file() and measured.kind == "run" else ())
    result = make_plan(rows, model, limits, level or 0.99, seed)
    console = Console()
    q = f"p{100 * result.percentile:g}"
    table = Table("replicas", f"TTFT {q} (s)", f"TPOT {q} (ms)")
    for count, ttft, tpot in result.table:
        style = "bold green" if count == result.replicas else None
        table.add_row(str(count), number(ttft), number(1e3 * tpot), style=style)
    console.print(table, highlight=False)
    console.print(
        f"{result.replicas} replicas [{result.low}, {result.high}] for {slo}; a Poisson process of the same "
        f"{number(result.mean_rate)} requests/s would have said {result.poisson_replicas}",
        highlight=False,
        markup=False,
    )
    console.print(
        f"fitted from the {model.source}: prefill {number(model.prefill_rate)} tokens/s after "
        f"{number(1e3 * model.prefill_start)} ms, decode {number(1e3 * model.decode_base)} ms + "
        f"{number(1e3 * model.decode_slope)} ms a running request, at most {model.max_running} at once",
        highlight=False,
    )
    _warn(console, [measured])
    if paid:
        monthly = paid.hourly * result.replicas * HOURS_A_MONTH
        console.print(f"${monthly:,.0f} a month ({paid.source})", highlight=False)
