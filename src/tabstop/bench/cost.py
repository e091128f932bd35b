"""What a token costs: price of the devices held / tokens they make, at capacity and at the utilisation one really has.

Every figure carries its source. With reports of at least four different mixes, device seconds are split over uncached
input, cached input and output tokens by non-negative least squares; from fewer they cannot be told apart, and the
whole price is put on the output tokens.
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from tabstop.bench.metrics import Summary
from tabstop.bench.report import BenchReport
from tabstop.errors import InputError

HOURS_A_MONTH = 730.0
OLD_AFTER = 90  # days
UTILIZATIONS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
MAX_CONDITION = 100.0  # of the scaled mixes; beyond it prices of single kinds mean nothing


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What is paid an hour for all devices of one replica. unit: USD"""

    hourly: float
    source: str
    date: datetime.date
    name: str = ""

    def age(self, today: datetime.date) -> int:
        return (today - self.date).days


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number of the cost report and where it comes from."""

    name: str
    value: float | None
    unit: str
    source: str
    low: float | None = None
    high: float | None = None


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """One measured load. unit: per second of one replica"""

    label: str
    uncached: float
    cached: float
    output: float
    requests: float
    kind: Literal["slo", "saturated", "load"]  # proven to keep the SLO; as much as there is; or just some load


class CostQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """What the user wants to know beside the price of a token."""

    price: Price
    utilization: float = 1.0
    acceptance: float | None = None  # share of completions that the user takes
    api_prices: dict[str, float] = {}  # input, cached, output: USD a million
    tariff: float | None = None  # USD a kWh


def read_book(path: Path | None = None) -> list[dict[str, Any]]:
    """Entries of a price book. Raises InputError for a file that is none."""
    try:
        text = (
            path.read_text() if path else resources.files("tabstop.bench").joinpath("data", "prices.toml").read_text()
        )
        entries = list(tomllib.loads(text)["price"])
        for entry in entries:
            _check_entry(entry)
        return entries
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a price book ({error}); see docs/benchmarking.md for its fields") from None


def _check_entry(entry: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError for what is no entry of a price book."""
    if not 0 <= float(entry["hourly"]) < math.inf or int(entry["devices"]) < 1:
        raise ValueError("hourly must be 0 or more, devices 1 or more")
    if not isinstance(entry["name"], str) or not isinstance(entry["source"], str):
        raise ValueError("name and source are texts")
    if type(entry["date"]) is not datetime.date:
        raise ValueError("date is a day without quotes: 2026-11-25")


def check_devices(num_devices: int) -> None:
    """Raises InputError for a machine without devices."""
    if num_devices < 1:
        raise InputError(f"--devices is {num_devices}; it must be at least 1")


def parse_price(written: str, num_devices: int, today: datetime.date) -> Price:
    """`4.10/gpu-hour` (× devices), `32.77/hour` or `32.77`. Raises InputError for anything else."""
    amount, _, unit = written.lstrip("$").partition("/")
    try:
        hourly = float(amount)
        if not 0 <= hourly < math.inf or unit not in ("", "hour", "h", "gpu-hour", "device-hour"):
            raise ValueError
    except ValueError:
        raise InputError(f"cannot read --price {written!r}; write 4.10/gpu-hour or 32.77/hour") from None
    check_devices(num_devices)
    if unit in ("gpu-hour", "device-hour"):
        hourly *= num_devices
    return Price(hourly=hourly, source=f"--price {written}, {num_devices} devices", date=today, name="given")


def book_price(name: str, num_devices: int | None = None, book: Path | None = None) -> Price:
    """An entry by name; with `num_devices`, that share of it. Raises InputError, listing the book, if absent."""
    check_devices(1 if num_devices is None else num_devices)
    entries = read_book(book)
    for entry in entries:
        if entry["name"].lower() == name.lower():
            devices = int(entry["devices"])
            share = 1.0 if num_devices is None else num_devices / devices
            told = f"{entry['source']}; {num_devices or devices} of {devices} devices paid"
            return Price(hourly=float(entry["hourly"]) * share, source=told, date=entry["date"], name=entry["name"])
    raise InputError(f"no price for {name!r}: give --price, or one of {', '.join(e['name'] for e in entries)}")


def mixes_of(report: BenchReport) -> list[Mix]:
    """Of a sweep: its saturation and every rate that met the SLO. Else: each endpoint's run."""
    found = []
    if report.sweep is not None:
        for point in report.sweep.points:
            if point.purpose == "saturation":
                found.append(_mix(point.summary, "saturated", "saturated"))
            elif point.purpose == "search" and point.is_met:
                found.append(_mix(point.summary, f"{point.rate:.3g} requests/s, which met the SLO", "slo"))
    else:
        found += [_mix(run.summary, run.label, "load") for run in report.runs]
    return [mix for mix in found if mix.output > 0]


def _mix(summary: Summary, label: str, kind: Literal["slo", "saturated", "load"]) -> Mix:
    tokens, length = summary.tokens, summary.window.length
    rate = summary.output_tokens_per_s.value or 0.0
    output = tokens.output_by_server if tokens.output_by_server is not None else tokens.output_counted
    per_output = rate / output if output else 0.0  # scales whole-run sums to the window's rate
    cached = tokens.cached or 0
    return Mix(
        label=label,
        uncached=(tokens.prompt - cached) * per_output,
        cached=cached * per_output,
        output=rate,
        requests=summary.requests_per_s.value or (summary.num_requests / length if length else 0.0),
        kind=kind,
    )


def capacity_of(mixes: Sequence[Mix]) -> Mix:
    """The highest rate that met the SLO, else the saturated one, else the run with the most tokens."""
    order = ("load", "saturated", "slo")
    return max(mixes, key=lambda mix: (order.index(mix.kind), mix.output))


def split_by_kind(mixes: Sequence[Mix]) -> tuple[np.ndarray, np.ndarray] | str:
    """Device seconds of an uncached input, a cached input and an output token, with their leave-one-out errors.

    shape: (3,), (3,). Or the reason why they cannot be told apart. A kind that no mix has costs nothing (0 ± 0).
    """
    from scipy import optimize  # half a second to import, and most commands never split a price

    if len(mixes) < 4:
        return f"needs runs of at least 4 different mixes at capacity, there are {len(mixes)}"
    table = np.array([[mix.uncached, mix.cached, mix.output] for mix in mixes])
    present = table.sum(axis=0) > 0
    scaled = table[:, present] / table[:, present].max(axis=0)
    if np.linalg.cond(scaled) > MAX_CONDITION:
        return "the mixes are too alike: vary the input : output ratio (and cache hits) between the runs"

    def fit(rows: np.ndarray) -> np.ndarray:
        seconds = np.zeros(3)
        seconds[present], _ = optimize.nnls(rows[:, present], np.ones(len(rows)))
        return seconds

    left_out = np.array([fit(np.delete(table, i, axis=0)) for i in range(len(table))])
    errors = np.sqrt((len(table) - 1) * ((left_out - left_out.mean(axis=0)) ** 2).mean(axis=0))
    return fit(table), errors


def cost_figures(reports: Sequence[BenchReport], question: CostQuestion) -> list[Figure]:
    """All figures, in the order in which they are read. Raises InputError if the reports made no tokens."""
    mixes = [mix for report in reports for mix in mixes_of(report)]
    if not mixes:
        raise InputError("the reports hold no run that made tokens")
    _check_question(question)
    capacity = capacity_of(mixes)
    price = question.price
    second = price.hourly / 3600
    measured = "measured load (run a sweep for the capacity)" if capacity.kind == "load" else "measured capacity"
    base = f"{price.source} ({price.date}); {measured}: {capacity.label}, {capacity.output:.4g} output tokens/s"
    whole = 1e6 * second / capacity.output
    figures = [
        Figure(name="output tokens, all cost on them, at capacity", value=whole, unit="USD/million", source=base)
    ]
    at_use = f"{base}; utilisation {100 * question.utilization:g} %"
    figures.append(
        Figure(
            name=f"output tokens, all cost on them, at {100 * question.utilization:g} % use",
            value=whole / question.utilization,
            unit="USD/million",
            source=at_use,
        )
    )
    busy = [mix for mix in mixes if mix.kind != "slo"]  # a rate under the SLO leaves the device idle at times
    figures += _split_figures(busy, second, question.utilization, price)
    figures += _request_figures(reports, capacity, second, question, at_use)
    figures += _break_even(capacity, question)
    figures += _energy_figures(reports, question)
    return figures


def _check_question(question: CostQuestion) -> None:
    """Raises InputError for shares and prices that cannot be."""
    for name in ("utilization", "acceptance"):
        share = getattr(question, name)
        if share is not None and not 0 < share <= 1:
            raise InputError(f"--{name} is {share:g}; it must be over 0 and at most 1")
    amounts = question.api_prices | ({} if question.tariff is None else {"tariff": question.tariff})
    for name, amount in amounts.items():
        if not 0 <= amount < math.inf:
            raise InputError(f"the price {name} is {amount:g}; it must be 0 or more")


def _split_figures(mixes: Sequence[Mix], second: float, utilization: float, price: Price) -> list[Figure]:
    names = ("uncached input tokens", "cached input tokens", "output tokens alone")
    split = split_by_kind(mixes)
    if isinstance(split, str):
        return [Figure(name=name, value=None, unit="USD/million", source=split) for name in names]
    source = f"least squares over {len(mixes)} mixes, ± leave-one-out; {price.source} ({price.date})"
    figures = []
    for use in dict.fromkeys((1.0, utilization)):
        for name, seconds, error in zip(names, *split, strict=True):
            value, spread = 1e6 * second * seconds / use, 1e6 * second * 1.96 * error / use
            figures.append(
                Figure(
                    name=f"{name}, at {'capacity' if use == 1 else f'{100 * use:g} % use'}",
                    value=float(value),
                    low=max(0.0, float(value - spread)),
                    high=float(value + spread),
                    unit="USD/million",
                    source=source,
                )
            )
    return figures


def _request_figures(
    reports: Sequence[BenchReport], capacity: Mix, second: float, question: CostQuestion, source: str
) -> list[Figure]:
    if not capacity.requests:
        return []
    per_request = second / capacity.requests / question.utilization
    figures = [Figure(name="request", value=per_request, unit="USD", source=source)]
    if question.acceptance:
        shown = f"{source}; acceptance {100 * question.acceptance:g} %"
        figures.append(
            Figure(name="accepted completion", value=per_request / question.acceptance, unit="USD", source=shown)
        )
    sent = sum(run.summary.num_requests for report in reports for run in report.runs)
    given_up = sum(
        run.summary.outcomes.get(name, 0)
        for report in reports
        for run in report.runs
        for name in ("cancelled", "superseded", "error", "timeout")
    )
    share = given_up / sent if sent else 0.0
    figures.append(Figure(name="requests paid for and not delivered", value=share, unit="share", source="the reports"))
    return figures


def _break_even(capacity: Mix, question: CostQuestion) -> list[Figure]:
    if not question.api_prices:
        return []
    prices = question.api_prices
    per_second = (
        capacity.uncached * prices.get("input", 0.0)
        + capacity.cached * prices.get("cached", prices.get("input", 0.0))
        + capacity.output * prices.get("output", 0.0)
    ) / 1e6
    monthly = question.price.hourly * HOURS_A_MONTH
    told = ", ".join(f"{kind} ${price:g}/million" for kind, price in prices.items())
    if per_second <= 0:
        return [Figure(name="break-even with the API", value=None, unit="share", source=f"the API is free: {told}")]
    share = monthly / (per_second * 3600 * HOURS_A_MONTH)
    tokens = share * capacity.output * 3600 * HOURS_A_MONTH / 1e6
    source = f"--api-price {told}; this mix of tokens; {question.price.source} ({question.price.date})"
    name = "utilisation over which this server is cheaper than the API"
    verdict = "" if share <= 1 else " (over 1: the API is always cheaper)"
    return [
        Figure(name=name, value=share, unit="share", source=source + verdict),
        Figure(name="the same in output tokens", value=tokens, unit="million/month", source=source),
    ]


def _energy_figures(reports: Sequence[BenchReport], question: CostQuestion) -> list[Figure]:
    joules = [(run.joules, run) for report in reports for run in report.runs if run.joules]
    if not joules:
        notes = sorted({run.energy_note for report in reports for run in report.runs if run.energy_note})
        source = "; ".join(notes) or "no card with an energy counter was read"
        return [Figure(name="energy", value=None, unit="J/output token", source=source)]
    total = sum(used or 0.0 for used, _ in joules)
    tokens = sum(run.summary.tokens.output_counted for _, run in joules)
    source = "NVML energy counter over the whole run, idle power included"
    figures = [Figure(name="energy", value=total / max(1, tokens), unit="J/output token", source=source)]
    if question.tariff is not None:
        value = 1e6 * total / max(1, tokens) / 3.6e6 * question.tariff
        shown = f"{source}; --tariff {question.tariff:g} USD/kWh"
        figures.append(Figure(name="electricity of output tokens", value=value, unit="USD/million", source=shown))
    return figures


def utilization_curve(figures: Sequence[Figure]) -> list[tuple[float, float]]:
    """(utilisation, USD a million output tokens), for the table and the plot."""
    whole = figures[0].value or 0.0
    return [(share, whole / share) for share in UTILIZATIONS]
