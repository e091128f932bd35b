"""The commands as a user types them, against golden servers that they start themselves."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from typer.testing import CliRunner

from tabstop.bench.cli import bench_app
from tabstop.bench.records import read_jsonl
from tabstop.bench.report import read_report, redacted
from tabstop.bench.selftest import truth
from tabstop.errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = ["--num-requests", "12", "--output", "4", "--concurrency", "3", "--workers", "1", "--max-lag", "1"]


def golden(**behaviour: object) -> str:
    told = json.dumps({"ttft": 0.01, "rate": 1000} | behaviour)
    return f"{sys.executable} -m tabstop.bench.golden --behaviour {shlex.quote(told)}"


def bench(*arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tabstop.bench", *arguments]
    wide = os.environ | {"COLUMNS": "240"}  # tables without broken lines
    with tempfile.TemporaryDirectory() as folder:
        wide["TMPDIR"] = folder
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=wide, cwd=ROOT)
        assert os.listdir(folder) == [], "the command left files behind"
    return done


def refused(*arguments: str) -> str:
    """What a command says that ends with 2. In this process: an interpreter of its own takes a second of a core."""
    done = CliRunner().invoke(bench_app, list(arguments[1:]))
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    start = golden(style="several")
    slo = ["--slo", "ttft=1,e2e=5", "--input", "16:400"]
    done = bench("bench", "run", "--start", start, *SMALL, *slo, "--num-requests", "60", "--out", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_run_leaves_every_form_of_its_report(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"report.json", "report.html", "requests.jsonl", "summary.csv", "summary.md"}
    report = read_report(finished / "report.json")
    run = report.runs[0]
    assert run.summary.outcomes == {"ok": 60} and run.summary.tokens.output_counted == 240
    assert run.summary.latencies["ttft"].percentiles["p99"].value is None  # 60 requests carry no p99
    assert report.environment["cores"] and report.setup.workload.seed
    records = read_jsonl(finished / "requests.jsonl")
    assert len(records) == 60 and all(r.text == "" and r.digest for r in records)
    assert "output tokens/s" in (finished / "summary.csv").read_text()
    assert "Repeat with" in (finished / "summary.md").read_text()


class Page(html.parser.HTMLParser):
    """Collects tags and what they refer to."""

    VOID = ("meta", "link", "br", "line", "circle", "rect", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_self_contained_and_well_formed(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.targets == ["data:,"] and "script" not in page.tags
    assert page.tags.count("svg") >= 8
    assert "prefers-color-scheme: dark" in text and not re.search(r"url\(|@import", text)


def test_an_overloaded_client_makes_a_run_invalid(tmp_path: Path) -> None:
    out = ["--max-lag", "0.0000001", "--out", str(tmp_path)]
    assert "give only one of them" in refused("bench", "run", "--start", golden(), *SMALL, "--rate", "50", *out)
    open_loop = ["--num-requests", "12", "--output", "4", "--workers", "1", "--rate", "50"]
    done = bench("bench", "run", "--start", golden(), *open_loop, *out)
    assert done.returncode == 3, done.stdout
    assert "INVALID" in done.stdout and not read_report(tmp_path / "report.json").is_valid


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["127.0.0.1:1"], "cannot reach http://127.0.0.1:1"),
        (["--start", golden(), "--model", "gpt"], "does not know the model 'gpt'; it offers golden"),
        (["--start", golden(ignore_max_tokens=True)], "ignores max_tokens: 3 were asked for, 6 came"),
        (["--start", golden(fault="garbage", fault_share=1)], "broken SSE"),
        (["--start", golden(fault="no-end", fault_share=1)], "without a finish reason"),
        (["--start", "no-such-server --port {port}"], "cannot start 'no-such-server'"),
        (["--start", f"{sys.executable} -c 'raise SystemExit(5)'"], "ended with code 5"),
        (["--start", golden(), "--workload", "trace", "--trace", "nowhere.csv"], "no trace 'nowhere.csv'"),
        (["--start", golden(), "--workload", "poetry"], "unknown workload 'poetry'"),
        (["--start", golden(), "--slo", "speed=1"], "cannot read 'speed=1' of --slo"),
        (["--start", golden(), "--input", "many"], "cannot read the length 'many'"),
        (["--start", golden(), "--header", "nonsense"], "has no colon"),
        (["--start", golden(), "--dialect", "tgi", "--workload", "fim", "--folder", "tests"], "or --fim-template"),
        (["ftp://127.0.0.1:1"], "write http://HOST:PORT"),
        (["http://127.0.0.1:99999"], "write http://HOST:PORT"),
        ([], "give one URL or one --start command"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, arguments: list[str], message: str) -> None:
    said = refused("bench", "run", *arguments, "--num-requests", "4", "--out", str(tmp_path))
    assert message in said and "Traceback" not in said


def test_bad_input_ends_the_command_itself_with_one_line() -> None:
    done = bench("bench", "run", "127.0.0.1:1", "--num-requests", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot reach http://127.0.0.1:1") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "nonsense"], "nonsense"),
        (["--price", "much"], "cannot read --price 'much'"),
        (["--rate", "-1"], "the rate is -1"),
        (["--workload", "fim", "--folder", "/nowhere"], "no folder '/nowhere'"),
        (["--tokenizer", "/nowhere"], "no tokenizer at /nowhere"),
        (["--out", "pyproject.toml"], "cannot make the folder pyproject.toml"),
    ],
)
def test_bad_options_are_found_before_anything_is_asked(arguments: list[str], message: str) -> None:
    """Port 1 answers nobody: whoever reached it first would complain about that."""
    said = refused("bench", "run", "127.0.0.1:1", *arguments)
    assert message in said and "cannot reach" not in said


def test_a_run_in_which_nothing_succeeds_fails_and_keeps_its_report(tmp_path: Path) -> None:
    slow = ["--start", golden(rate=20), "--output", "4000", "--timeout", "1", "--out", str(tmp_path)]
    done = bench("bench", "run", *SMALL, *slow, "--warm-up-requests", "0")
    assert done.returncode == 2 and "succeeded: no end after 1 s" in done.stderr, done.stderr
    assert read_report(tmp_path / "report.json").runs[0].summary.outcomes == {"timeout": 12}


def test_a_trace_without_its_columns_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("TIMESTAMP,GeneratedTokens\n0,1\n")
    asked = ("--start", golden(), "--workload", "trace", "--trace", str(tmp_path / "t.csv"))
    assert "no input column" in refused("bench", "run", *asked)


def test_the_built_in_trace_is_replayed(tmp_path: Path) -> None:
    options = ["--workload", "trace", "--num-requests", "30", "--trace-speed", "20", "--max-lag", "1"]
    done = bench("bench", "run", "--start", golden(rate=20000), *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "report.json")
    assert report.runs[0].summary.tokens.prompt > 30_000 and report.setup.load.mode == "replay"


def interrupt_after(
    process: subprocess.Popen[str], num_requests: int, how: signal.Signals, victim: str = ""
) -> list[psutil.Process]:
    """Sends the signal when the golden servers have seen so many requests, to the command or its first child with the
    victim's name; returns all children of then."""
    parent = psutil.Process(process.pid)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if sum(map(num_answered, parent.children())) >= num_requests:
            break
        time.sleep(0.1)
    children = parent.children(recursive=True)
    named = [child for child in children if victim and victim in child.cmdline()]
    (named[0] if named else process).send_signal(how)
    return children


def num_answered(child: psutil.Process) -> int:
    """Requests that a golden server has seen; 0 for any other process, and while it starts."""
    try:
        ports = [c.laddr.port for c in child.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        return sum(told.num_before + 1 for port in ports for told in truth(f"http://127.0.0.1:{port}").values())
    except (psutil.Error, OSError):
        return 0


@pytest.mark.parametrize(("kind", "how"), [("run", signal.SIGINT), ("compare", signal.SIGINT), ("run", signal.SIGTERM)])
def test_an_interrupted_run_keeps_what_was_measured_and_stops_its_servers(
    tmp_path: Path, kind: str, how: signal.Signals
) -> None:
    servers = ["--start", golden()] * (1 if kind == "run" else 2)
    command = [sys.executable, "-m", "tabstop.bench", "bench", kind, *servers, "--out", str(tmp_path), "--workers", "1"]
    command += ["--output", "4", "--max-lag", "1"]
    endless = ["--rate", "20", "--num-requests", "2000"]
    blocks = ["--num-requests", "4", "--concurrency", "2", "--blocks", "500", "--aa-blocks", "0"]
    command += endless if kind == "run" else blocks
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = interrupt_after(process, 40, how)  # two blocks and more of the comparison
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert len(children) >= 2 and psutil.wait_procs(children, timeout=10)[1] == []
    report = read_report(tmp_path / "report.json")
    assert report.runs[0].is_interrupted and 0 < report.runs[0].summary.num_requests < 2000


def test_a_comparison_interrupted_in_its_first_block_keeps_what_it_has(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tabstop.bench",
        "bench",
        "compare",
        "--start",
        golden(),
        "--start",
        golden(rate=1),
    ]
    command += ["--out", str(tmp_path), "--workers", "1", "--max-lag", "1", "--output", "30", "--num-requests", "4"]
    command += ["--aa-blocks", "1", "--warm-up-requests", "0", "--label", "quick", "--label", "slow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = interrupt_after(process, 14, signal.SIGINT)  # four probes, and the first half of A against itself
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert psutil.wait_procs(children, timeout=10)[1] == []
    report = read_report(tmp_path / "report.json")
    assert report.comparison is not None and report.comparison.pairs == []
    assert report.runs[0].label == "quick" and report.runs[0].summary.outcomes["ok"] >= 4
    assert "interrupted" in output and (tmp_path / "report.html").is_file()


def test_a_self_test_ends_when_it_is_told_to() -> None:
    command = [sys.executable, "-m", "tabstop.bench", "bench", "selftest", "--streams", "4", "--seconds", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children = interrupt_after(process, 4, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "accounts" not in output, output
    assert children and psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("kind", ["run", "compare"])
def test_a_server_that_dies_costs_nothing_that_was_measured(tmp_path: Path, kind: str) -> None:
    servers = ["--start", golden()] * (1 if kind == "run" else 2)
    command = [sys.executable, "-m", "tabstop.bench", "bench", kind, *servers, "--out", str(tmp_path), "--workers", "1"]
    command += ["--max-lag", "1", "--output", "4"]
    command += (
        ["--rate", "40", "--num-requests", "200"] if kind == "run" else ["--num-requests", "4", "--blocks", "500"]
    )
    command += [] if kind == "run" else ["--aa-blocks", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = interrupt_after(process, 40, signal.SIGKILL, victim="tabstop.bench.golden")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "ended during the run" in " ".join(output.split()), output
    assert psutil.wait_procs(killed, timeout=10)[1] == []
    assert read_report(tmp_path / "report.json").runs[0].summary.outcomes["ok"] > 10


def test_a_run_without_streaming(tmp_path: Path) -> None:
    done = bench("bench", "run", "--start", golden(), *SMALL, "--no-stream", "--slo", "e2e=5", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_report(tmp_path / "report.json").runs[0]
    assert (run.summary.outcomes, run.summary.tokens.output_counted) == ({"ok": 12}, 48)
    assert set(run.summary.latencies) == {"e2e", "completion"} and run.summary.goodput
    assert "Time to first token, p50" in (tmp_path / "report.html").read_text()
    said = refused("bench", "run", "--start", golden(), "--no-stream", "--slo", "ttft=1")
    assert "shows only the ends of answers" in said


def test_each_endpoint_may_need_its_own_body_fields(tmp_path: Path) -> None:
    """The second server is told so by its fields that it should make one token less: unequal work."""
    servers = ["--start", golden(), "--start", golden(), "--extra", "{}", "--extra", '{"max_tokens": 3}']
    options = [*SMALL, "--blocks", "4", "--aa-blocks", "0", "--out", str(tmp_path)]
    done = bench("bench", "compare", *servers, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = read_report(tmp_path / "report.json").runs
    assert [run.summary.output_lengths["mean"] for run in runs] == [4, 3]
    assert "3 times for 2 endpoints" in refused("bench", "compare", *servers, "--extra", "{}")
    twice = refused("bench", "compare", *servers[:4], "--label", "same", "--label", "same")
    assert "as many different names" in twice


@pytest.mark.parametrize("mode", ["together", "one-at-a-time"])
def test_compare_starts_its_servers(tmp_path: Path, mode: str) -> None:
    servers = ["--start", golden(), "--start", golden(slow_down=5)]
    options = [*SMALL, "--blocks", "4", "--aa-blocks", "0", "--label", "one", "--label", "two", "--out", str(tmp_path)]
    options += ["--one-at-a-time"] if mode == "one-at-a-time" else []
    done = bench("bench", "compare", *servers, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "report.json")
    assert report.comparison is not None
    pair = report.comparison.pairs[0]
    assert (pair.baseline, pair.candidate, pair.refused) == ("one", "two", "")
    assert [run.summary.outcomes for run in report.runs] == [{"ok": 96}] * 2
    assert "slower" in {judgement.verdict for judgement in pair.judgements}
    assert "two against one" in (tmp_path / "report.html").read_text()


def test_sweep_writes_its_curve(tmp_path: Path) -> None:
    options = ["--num-requests", "12", "--output", "4", "--workers", "1", "--max-lag", "1", "--min-duration", "0.1"]
    limits = ["--slo", "ttft_p90=0.5", "--saturating-concurrency", "2", "--max-requests", "60"]
    done = bench(
        "bench", "sweep", "--start", golden(slots=2, ttft=0.004, rate=2000), *options, *limits, "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "report.json")
    assert report.sweep is not None and report.sweep.percentile == 0.9
    assert {point.purpose for point in report.sweep.points} == {"saturation", "curve", "search"}


def test_sanity_prints_the_arithmetic() -> None:
    claims = ROOT / "benchmarks" / "article_claims.json"
    done = bench("bench", "sanity", str(claims))
    assert done.returncode == 0 and "12.8 ms a token" in " ".join(done.stdout.split())


def test_a_run_against_hardware_facts_is_checked(tmp_path: Path) -> None:
    config = {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "vocab_size": 32016}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = ["--gpu", "a100-80gb", "--model-config", str(tmp_path / "config.json")]
    done = bench("bench", "run", "--start", golden(), *SMALL, *facts, "--out", str(tmp_path / "out"))
    flags = read_report(tmp_path / "out" / "report.json").runs[0].sanity
    assert done.returncode == 0 and any("bandwidth floor" in flag.what for flag in flags)


def test_cost_and_plan_read_the_report(finished: Path) -> None:
    report = str(finished / "report.json")
    done = bench("cost", report, "--price", "4.10/gpu-hour", "--devices", "2", "--acceptance", "0.3")
    assert done.returncode == 0 and "--price 4.10/gpu-hour, 2" in " ".join(done.stdout.split()), done.stdout
    done = bench("cost", report)
    assert done.returncode == 2 and "give --price, or --sku" in " ".join(done.stderr.split())
    done = bench("plan", "--report", report, "--slo", "ttft_p99=0.5")
    assert done.returncode == 2 and "this is not extrapolated" in " ".join(done.stderr.split())


def test_keys_do_not_reach_the_report() -> None:
    command = ["--header", "Authorization: Bearer secret", "--header=X-API-Key: secret", "http://x:80"]
    assert redacted(command) == ["--header", "Authorization: …", "--header=X-API-Key: …", "http://x:80"]


def test_reports_of_another_version_are_refused(finished: Path, tmp_path: Path) -> None:
    content = msgspec.json.decode((finished / "report.json").read_bytes())
    (tmp_path / "old.json").write_text(json.dumps(content | {"schema": "tabstop-bench-report/0"}))
    with pytest.raises(InputError, match="this version reads"):
        read_report(tmp_path / "old.json")
    (tmp_path / "bad.json").write_text("{}")
    for path in (tmp_path / "bad.json", tmp_path / "absent.json"):
        with pytest.raises(InputError, match=r"not a benchmark report|cannot read"):
            read_report(path)


@pytest.mark.parametrize("workload", ["typing", "chat", "agent", "fim"])
def test_sessions_run_to_their_end(tmp_path: Path, workload: str) -> None:
    num = "2" if workload == "typing" else "12"
    options = [
        "--num-requests",
        num,
        "--workload",
        workload,
        "--folder",
        "tests",
        "--turns",
        "3",
        "--think-time",
        "0.01",
    ]
    options += ["--prefix-tokens", "32", "--warm-up-requests", "0"]
    done = bench("bench", "run", "--start", golden(), *SMALL, *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = read_report(tmp_path / "report.json").runs[0].summary.outcomes
    assert set(outcomes) <= {"ok", "superseded"} and outcomes["ok"] >= 2
    assert sum(outcomes.values()) == {"chat": 36, "agent": 36, "fim": 12}.get(workload, sum(outcomes.values()))
    assert "cannot be true" not in done.stdout


def test_compare_counts_text_with_the_servers_own_tokenizer(tmp_path: Path) -> None:
    """Text prompts have the exact length in the server's own tokens, which its /tokenize counts."""
    first, second = golden(), golden()
    options = ["--blocks", "4", "--aa-blocks", "0", *SMALL, "--input", "40", "--prompt-form", "text"]
    done = bench("bench", "compare", "--start", first, "--start", second, *options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    tokens = [run.summary.prompt_lengths for run in read_report(tmp_path / "report.json").runs]
    assert [(t["min"], t["max"]) for t in tokens] == [(40, 40)] * 2
    alone = refused("bench", "compare", "--start", first, "--start", second, *options, "--one-at-a-time")
    assert "needs --tokenizer" in alone
