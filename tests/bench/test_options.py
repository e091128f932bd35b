"""Options and folders that cannot be meant are found before anything is asked; no disk loses a report."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tabstop.bench.arrivals import arrivals
from tabstop.bench.cli import _finish, bench_app
from tabstop.bench.metrics import summarize
from tabstop.bench.options import Options, make_setup, parse_slo
from tabstop.bench.outputs import check_writable, write_somewhere
from tabstop.bench.records import Record
from tabstop.bench.report import read_report
from tabstop.bench.workloads.lengths import draw_lengths
from tabstop.errors import ConfigError, InputError
from tests.bench.test_untrusted_text import evil_report

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_requests", 0), ("seed", -1), ("vocabulary", 1), ("turns", 0), ("prefixes", 0), ("devices", 0)),
        *(("trace_skip", -5), ("max_input", 0), ("warm_up_requests", -1), ("prefix_tokens", -1), ("ramp", -1.0)),
        *(("trace_speed", 0.0), ("timeout", 0.0), ("duration", -1.0), ("cancel_after", 0.0), ("think_time", -1.0)),
        *(("warm_up", NAN), ("timeout", NAN), ("rest", NAN), ("temperature", float("inf")), ("max_lag", NAN)),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is .* must be a number, "):
        make_setup(Options(**{name: value}))  # type: ignore[arg-type]
    make_setup(Options(**{name: max(2, abs(int(value)))}) if value == value and value < 1e9 else Options())  # type: ignore[arg-type]


def test_rates_limits_and_lengths_are_finite() -> None:
    for rate in (NAN, float("inf")):
        with pytest.raises(ConfigError, match="the rate is"):
            arrivals("poisson", rate, 3, None)  # type: ignore[arg-type]
    for written in ("ttft=nan", "ttft=inf", "ttft_p=1", "ttft_px=1"):
        with pytest.raises(ConfigError, match="--slo"):
            parse_slo(written)
    for written in ("99999999999", "1:99999999999", "1,99999999999", "lognormal:0:1"):
        with pytest.raises(ConfigError, match="cannot read the length"):
            draw_lengths(written, 1, None)  # type: ignore[arg-type]


def test_a_self_test_without_workers_is_refused() -> None:
    done = CliRunner().invoke(bench_app, ["selftest", "--workers", "0"])
    assert done.exit_code == 2, done.output


def test_a_folder_that_cannot_be_written_is_found_first() -> None:
    with pytest.raises(InputError, match="cannot write into the folder"):
        check_writable(Path("/proc/self"))


def test_a_report_that_has_no_place_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = tmp_path / "wanted"
    (wanted / "report.json").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = write_somewhere(evil_report(), [], wanted)
    assert folder != wanted and str(folder) in capsys.readouterr().err
    assert read_report(folder / "report.json").kind == "run"


def test_answers_without_a_token_are_no_measurement(tmp_path: Path) -> None:
    report = evil_report()
    report.runs[0].summary = summarize([Record(session=0, intended=0, sent=0, ended=1, finish_reason="stop")])
    report.runs[0].is_interrupted = False
    with pytest.raises(InputError, match="held a token"):
        _finish(report, [], Options(out=tmp_path))
    assert (tmp_path / "report.json").is_file()
