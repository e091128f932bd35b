"""What `tabstop cost` and `tabstop plan` are given: wrong numbers, wrong books, reports that cannot carry an answer."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tabstop.bench.cli_money import cost, plan
from tabstop.bench.cost import CostQuestion, book_price, cost_figures, parse_price, read_book
from tabstop.bench.plan import ReplicaModel, check_range
from tabstop.bench.report import BenchReport, read_report, write_report
from tabstop.bench.workloads.trace import Trace
from tabstop.errors import InputError
from tests.bench.test_untrusted_text import evil_report

TODAY = datetime.date(2026, 11, 23)
FREE = parse_price("1", 1, TODAY)


def test_prices_that_cannot_be_are_refused() -> None:
    for written, devices in (("nan", 1), ("inf/hour", 1), ("1/gpu-hour", 0), ("1/gpu-hour", -2)):
        with pytest.raises(InputError, match=r"--price|--devices"):
            parse_price(written, devices, TODAY)
    with pytest.raises(InputError, match="--devices is -2"):
        book_price("h200", -2)
    wrong = [{"acceptance": 0.0}, {"acceptance": 5.0}, {"utilization": float("nan")}, {"tariff": -1.0}]
    for question in (*wrong, {"api_prices": {"output": float("nan")}}):
        with pytest.raises(InputError, match=r"must be|is nan"):
            cost_figures([evil_report()], CostQuestion(price=FREE, **question))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["devices = 0", "hourly = -1.0", "hourly = nan", 'date = "2026-01-01"', "name = 5"])
def test_a_price_book_is_checked_line_by_line(tmp_path: Path, wrong: str) -> None:
    entry = {"name": '"a"', "hourly": "1.0", "devices": "1", "date": "2026-01-01", "source": '"s"'}
    name, _, value = wrong.partition(" = ")
    lines = [f"{key} = {told}" for key, told in (entry | {name: value}).items()]
    (tmp_path / "book.toml").write_text("[[price]]\n" + "\n".join(lines))
    with pytest.raises(InputError, match="is not a price book"):
        read_book(tmp_path / "book.toml")


def test_the_version_of_a_report_is_read_before_the_rest(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text('{"schema": "tabstop-bench-report/2", "runs": {}}')
    with pytest.raises(InputError, match=r"has the schema 'tabstop-bench-report/2'; this version reads"):
        read_report(tmp_path / "new.json")
    for number, content in enumerate((b'{"schema": "\xff"}', b'{"a":' + b"[" * 100_000)):
        (tmp_path / f"{number}.json").write_bytes(content)
        with pytest.raises(InputError, match="is not a benchmark report"):
            read_report(tmp_path / f"{number}.json")


def test_doubtful_reports_are_used_with_a_warning(tmp_path: Path) -> None:
    report: BenchReport = evil_report()
    report.runs[0].invalid = ["the client sent late"]
    write_report(report, tmp_path / "report.json")
    app = typer.Typer()
    app.command()(cost)
    done = CliRunner().invoke(app, [str(tmp_path / "report.json"), "--price", "1/hour"], env={"COLUMNS": "400"})
    assert done.exit_code == 0 and "the client sent late" in done.output and "was interrupted" in done.output


def test_a_plan_needs_a_speed_and_a_trace_with_a_rate(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(plan)
    for option in (("--speed", "0"), ("--speed", "nan"), ("--seed", "-1"), ("--price", "nan")):
        done = CliRunner().invoke(app, ["--report", "absent.json", "--slo", "ttft=1", *option])
        assert done.exit_code == 2 and option[0] in done.output and "absent" not in done.output
    model = ReplicaModel(prefill_start=0, prefill_rate=1, decode_base=1, decode_slope=0, max_running=8, max_prompt=99)
    with pytest.raises(InputError, match="come at one time"):
        check_range(Trace(np.zeros(3), np.ones(3), np.ones(3)), model)
    check_range(msgspec.structs.replace(Trace(np.arange(3.0), np.ones(3), np.ones(3))), model)
