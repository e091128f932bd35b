"""Writes a report in all its forms into one folder, and shows the short form on the console."""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tabstop.bench.export import capacity_line, summary_table, to_csv, to_markdown, verdict_table
from tabstop.bench.html import to_html
from tabstop.bench.records import Record, write_jsonl
from tabstop.bench.report import BenchReport, write_report
from tabstop.errors import InputError

VERDICT_STYLES = {"faster": "green", "slower": "red", "no difference": "cyan", "not comparable": "yellow"}


def output_folder(wanted: Path | None, kind: str) -> Path:
    """Raises InputError where it cannot be made or not be written into."""
    folder = wanted or Path(f"bench-{kind}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from None
    check_writable(folder)
    return folder


def check_writable(folder: Path) -> None:
    """Raises InputError where no file can be made, before anything is measured for it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write into the folder {folder}: {error.strerror}; choose another --out") from None


def write_somewhere(
    report: BenchReport, records: Sequence[tuple[str, Sequence[Record]]], wanted: Path | None, **how: Any
) -> Path:
    """write_all() into the folder that was wanted, else into a temporary one: nothing that was measured is lost."""
    try:
        folder = output_folder(wanted, report.kind)
        write_all(report, records, folder, **how)
    except (InputError, OSError) as error:
        folder = Path(tempfile.mkdtemp(prefix="tabstop-bench-"))
        write_all(report, records, folder, **how)
        told = f"warning: the report is not where it should be ({error}), but in {folder}"
        Console(stderr=True).print(told, markup=False, highlight=False, soft_wrap=True)
    return folder


def write_all(
    report: BenchReport,
    records: Sequence[tuple[str, Sequence[Record]]],
    folder: Path,
    *,
    keep_text: bool = False,
    price_per_hour: float | None = None,
) -> None:
    """report.json, summary.csv, summary.md, report.html, and each endpoint's requests as JSONL."""
    write_report(report, folder / "report.json")
    (folder / "summary.csv").write_text(to_csv(report), encoding="utf-8")
    (folder / "summary.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report, price_per_hour), encoding="utf-8")
    for number, (label, series) in enumerate(records):
        name = "requests.jsonl" if len(records) == 1 else f"requests-{number}-{_file_name(label)}.jsonl"
        write_jsonl(folder / name, series, keep_text=keep_text)


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")[:40] or "endpoint"


def show(report: BenchReport, folder: Path, console: Console) -> None:
    """The tables, the warnings, and where the files are."""
    _show_table(console, summary_table(report), "")
    if report.comparison is not None:
        for pair in report.comparison.pairs:
            _show_table(console, verdict_table(pair.judgements), f"{pair.candidate} against {pair.baseline}")
            if pair.refused:
                console.print(f"[yellow]not comparable[/yellow]: {escape(pair.refused)}", highlight=False)
    if report.sweep is not None:
        console.print(capacity_line(report), highlight=False)
    for run in report.runs:
        tokens = run.summary.tokens
        for message, count in run.summary.errors.items():
            console.print(f"[red]{count} x[/red] {escape(message)}", highlight=False)
        if tokens.num_output_mismatches or tokens.num_prompt_mismatches:
            console.print(
                f"[yellow]token accounts differ[/yellow]: output in {tokens.num_output_mismatches}, "
                f"prompt in {tokens.num_prompt_mismatches} requests of {escape(run.label)}",
                highlight=False,
            )
        for flag in run.sanity:
            told = escape(f"{flag.what}: {flag.claim}; {flag.limit} ({flag.why})")
            console.print(f"[red]cannot be true[/red] {told}", highlight=False)
        for fault in run.invalid:
            console.print(f"[bold red]INVALID[/bold red] {escape(run.label)}: {escape(fault)}", highlight=False)
        if run.is_interrupted:
            console.print(f"[yellow]interrupted[/yellow]: {escape(run.label)} holds what was measured until then")
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False)


def _show_table(console: Console, rows: list[list[str]], title: str) -> None:
    table = Table(*map(escape, rows[0]), title=escape(title), title_justify="left")
    for row in rows[1:]:
        table.add_row(*[f"[{VERDICT_STYLES[c]}]{c}[/]" if c in VERDICT_STYLES else escape(c) for c in row])
    console.print(table, highlight=False)
