"""Names and messages that come from servers and files are shown as they are: no markup, no HTML, no secrets."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from tabstop.bench.cli_money import cost
from tabstop.bench.client import Endpoint
from tabstop.bench.html import to_html
from tabstop.bench.metrics import summarize
from tabstop.bench.options import Options, make_endpoint
from tabstop.bench.outputs import show
from tabstop.bench.probe import ServerFacts
from tabstop.bench.progress import LiveProgress
from tabstop.bench.records import Chunk, Record
from tabstop.bench.report import BenchReport, RunSection, describe_endpoint, redacted, write_report
from tabstop.bench.run import RunSetup
from tabstop.errors import ConfigError, InputError
from tabstop.exits import fails_in_one_line

EVIL = "[/red] [bold </script><script>alert(1)</script>"


def evil_report() -> BenchReport:
    records = [
        Record(session=0, intended=0, sent=0, ended=1, outcome="error", error=EVIL),
        Record(session=1, intended=0, sent=0, ended=1, chunks=[Chunk(0.5, 1, 1), Chunk(0.9, 1, 1)], counted_tokens=2),
    ]
    section = RunSection(
        label=EVIL,
        endpoint=describe_endpoint(Endpoint(url="http://x"), ServerFacts(models=[EVIL])),
        summary=summarize(records),
        health=[],
        lag_p50=0,
        lag_p99=0,
        invalid=[EVIL],
        is_interrupted=True,
    )
    return BenchReport(kind="run", created="", command=[EVIL], environment={}, setup=RunSetup(), runs=[section])


def test_the_console_and_the_page_show_text_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = io.StringIO()
    show(evil_report(), tmp_path, Console(file=shown, width=400))
    assert shown.getvalue().count(EVIL) >= 4  # column, error, INVALID, interrupted
    assert "<script" not in to_html(evil_report())

    @fails_in_one_line
    def fails() -> None:
        raise InputError(EVIL)

    with pytest.raises(typer.Exit):
        fails()
    assert EVIL in capsys.readouterr().err
    with LiveProgress(Console(file=io.StringIO(), force_terminal=True)) as live:
        live.task(EVIL, 1)


def test_a_cost_table_shows_any_label(tmp_path: Path) -> None:
    write_report(evil_report(), tmp_path / "report.json")
    app = typer.Typer()
    app.command()(cost)
    done = CliRunner().invoke(app, [str(tmp_path / "report.json"), "--price", "1/hour"], env={"COLUMNS": "400"})
    assert done.exit_code == 0 and "[/red]" in done.output


def test_secrets_and_bytes_that_are_no_text_stay_out_of_the_report() -> None:
    command = ["--header", "X-Auth-Token: a:b", "--start", "serve --api-key sk-1 --port {port}", "--label", "\udcff"]
    assert redacted(command) == [
        *("--header", "X-Auth-Token: …", "--start", "serve --api-key … --port {port}", "--label", "?")
    ]
    started = describe_endpoint(Endpoint(url="http://x"), ServerFacts(), "serve --hf-token=hf_1 --tokenizer t")
    assert started.start_command == "serve --hf-token=… --tokenizer t"
    with pytest.raises(ConfigError, match="password"):
        make_endpoint(Options(), "http://me:secret@host:80")
