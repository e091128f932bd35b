"""`tabstop eval` as a user runs it, against a front end over a socket and against servers that lie."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from tabstop.engine.fake import FakeEngine
from tabstop.errors import InputError
from tabstop.evaluation import Report, Task
from tabstop.evaluation.ask import Question, ask, check_question, first_model, open_session
from tabstop.evaluation.cli import eval_app
from tabstop.evaluation.tasks import DATA, SETS, load_tasks
from tabstop.text.defaults import stop_sets
from tabstop.text.tokenizer import load_tokenizer
from tabstop.types import Submit, unpack_ids
from tests.api.serving import Running, serving
from tests.bench.test_hostile import serving as lying
from tests.bench.test_hostile import status
from tests.text.fim_vocabularies import any_family

TASKS = {name: load_tasks(DATA / known.file) for name, known in SETS.items()}
WRONG = {6: "    raise ValueError\nmore", 7: "    import sys; sys.exit(0)\n"}
"""What the model says to some tasks; to all others it says what is right."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that knows the solutions by their prompts."""
    checkpoint = any_family(tmp_path_factory.mktemp("qwen"), "qwen")
    tokenizer = load_tokenizer(checkpoint)
    middle = tokenizer.token_id("<|fim_suffix|>")
    prefix = tokenizer.token_id("<|fim_prefix|>")
    end = tokenizer.token_id("<|fim_pad|>")

    def say(submit: Submit, sample: int) -> Iterator[int]:
        ids = unpack_ids(submit.prompt_ids)
        if prefix not in ids:  # the warm-up
            yield end
            return
        text = tokenizer.decode(ids[ids.index(prefix) + 1 : ids.index(middle)])
        for tasks in TASKS.values():
            for number, task in enumerate(tasks):
                if task.prompt == text or (submit.constraints and task.prompt.startswith(text) and len(text) > 50):
                    said = task.prompt[len(text) :] + WRONG.get(number, task.canonical_solution)
                    yield from tokenizer.encode(said, control=False)
                    yield end
                    return
        raise AssertionError(f"no task has the prompt {text!r}")

    with serving(checkpoint, FakeEngine(script=say, stop_sets=stop_sets(checkpoint, tokenizer))) as running:
        yield running


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tabstop", "eval", *map(str, arguments)]
    inherited = {"COLUMNS": "200", **{n: os.environ[n] for n in ("PYTHONPATH", "PATH") if n in os.environ}}
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=100)


def refused(*arguments: str | Path) -> list[str]:
    """The errors of a command that ends with 2, asked in this process: an interpreter of its own takes a second."""
    shown = CliRunner().invoke(eval_app, [str(argument) for argument in arguments])
    assert shown.exit_code == 2 and isinstance(shown.exception, SystemExit), shown.output
    return [line for line in shown.stderr.splitlines() if "warning:" not in line]


def read(path: Path) -> Report:
    return msgspec.json.decode(path.read_bytes(), type=Report)


def test_a_run_over_lines(server: Running, tmp_path: Path) -> None:
    out = tmp_path / "lines.json"
    shown = run("infilling", server.url, "--limit", "8", "--out", out)
    assert shown.returncode == 0, shown.stderr
    assert "runs programs that a model wrote" in shown.stderr and "no wall against malice" in shown.stderr
    assert "single-line, m: 6 of 8 passed (75.0%)" in shown.stdout
    report = read(out)
    assert [result.task_id for result in report.results] == [task.task_id for task in TASKS["single-line"][:8]]
    assert [result.error for result in report.results] == [""] * 6 + ["ValueError", "exit"]
    assert report.results[6].completion == "    raise ValueError\n", "a line ends the answer, and has its end"
    assert report.results[0].completion == TASKS["single-line"][0].canonical_solution
    assert report.is_complete and report.model == "m" and report.settings["max_tokens"] == 64
    assert all(result.num_tokens for result in report.results)
    server.assert_idle()


def test_spans_with_healing_and_the_comparison(server: Running, tmp_path: Path) -> None:
    first, second = tmp_path / "off.json", tmp_path / "on.json"
    options = ("--set", "random-span-light", "--limit", "5")
    for out, healing in ((first, "off"), (second, "on")):
        shown = run("infilling", server.url, *options, "--healing", healing, "--out", out, "--model", "x")
        assert shown.returncode == 0, shown.stderr
    assert [result.num_healed_tokens for result in read(first).results] == [0] * 5
    assert sum(result.num_healed_tokens > 0 for result in read(second).results) >= 3
    texts = [[result.completion for result in read(out).results] for out in (first, second)]
    assert texts[0] == texts[1] and "\n" in texts[0][0].rstrip("\n")
    shown = run("compare", first, second)
    assert "identical texts: 5 of 5 (100.0%); McNemar, exact: p = 1" in shown.stdout
    changed = read(second)
    changed.results[0] = msgspec.structs.replace(changed.results[0], passed=False, error="Oops", completion="\x1b[31m")
    second.write_bytes(msgspec.json.encode(changed))
    shown = run("compare", first, second)
    assert "off.json: 5 of 5 passed, 1 only here" in shown.stdout and "\x1b" not in shown.stdout
    assert "Oops" in shown.stdout
    compared = json.loads(run("compare", first, second, "--json").stdout)
    assert compared["num_only"] == [1, 0] and compared["num_identical"] == 4 and len(compared["differences"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infilling", "http://127.0.0.1:9", "--limit", "1"], "no server answers at http://127.0.0.1:9: "),
        (["infilling", "127.0.0.1:9"], "is no address of a server"),
        (["infilling", "http://a:b@127.0.0.1:9"], "set TABSTOP_EVAL_API_KEY instead"),
        (["infilling", "http://127.0.0.1:9", "--set", "multi-line"], "choose one of single-line, random-span-light"),
        (["infilling", "http://127.0.0.1:9", "--healing", "maybe"], "choose one of auto, off, on"),
        (["infilling", "http://127.0.0.1:9", "--data", "/nonexistent"], "cannot read /nonexistent"),
        (["infilling", "http://127.0.0.1:9", "--out", "README.md/x.json"], "cannot write README.md/x.json"),
        (["compare", "/nonexistent", "/nonexistent"], "cannot read /nonexistent"),
        (["compare", __file__, __file__], "is no file of `tabstop eval infilling`"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "infilling" and "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "x.json")]
    [error] = refused(*arguments)
    assert message in error


def test_the_command_itself_ends_with_one_line() -> None:
    shown = run("compare", "/nonexistent", "/nonexistent")
    assert (shown.returncode, shown.stdout) == (2, "") and shown.stderr.count("\n") == 1
    assert "cannot read /nonexistent" in shown.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", ":1: "), (b'{"task_id": 1}', "line 1"), (b"\n", "holds no task")],
)
def test_files_of_tasks_are_checked(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(content)
    [error] = refused("infilling", "http://127.0.0.1:9", "--data", path, "--out", tmp_path / "x.json")
    assert message in error or "line 1" in error


def test_ctrl_c_keeps_what_was_decided(tmp_path: Path) -> None:
    """The first tasks are answered, the others never; nothing is left behind."""
    checkpoint = any_family(tmp_path / "qwen", "qwen")
    tokenizer = load_tokenizer(checkpoint)
    engine = FakeEngine(stop_sets=stop_sets(checkpoint, tokenizer))
    out = tmp_path / "x.json"
    with serving(checkpoint, engine) as running:
        command = [sys.executable, "-m", "tabstop", "eval", "infilling", running.url, "--out", str(out)]
        process = subprocess.Popen(
            [*command, "--concurrency", "2"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        running.wait_until(lambda: engine.num_submitted >= 6)
        engine.delay = 60.0
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=30)
        assert process.returncode == 130, errors
        running.assert_idle()
    report = read(out)
    assert not report.is_complete and 0 < len(report.results) < 50 and "interrupted" in shown
    assert "Traceback" not in errors


# ---- servers that lie


TASK = Task(task_id="t", entry_point="f", prompt="p", suffix="s", test="")


def body(content: Any) -> bytes:
    return status("200 OK", "content-type: application/json\r\n", json.dumps(content).encode())


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (body({"choices": []}), "the answer is no completion"),
        (body({"choices": [{"text": "x"}], "usage": {"completion_tokens": "many"}}), "the answer is no completion"),
        (body([]), "the answer is no completion"),
        (status("200 OK", body=b"<html>"), "the answer is no completion"),
        (status("500 No"), "status 500"),
        (status("400 No", body=b'{"error": {"message": "no\\nsuffix"}}'), "400: no suffix"),
        (status("200 OK", body=b'{"choices":' + b"[" * 50_000), "the answer is no completion"),
        (status("400 No", body=b'{"error": {"message": "\\u001b[31mred"}}'), "400: \ufffd[31mred"),
        (status("400 No", body=b"[" * 50_000), "status 400"),
        (status("302 Go", "location: http://127.0.0.1:9/\r\n"), "status 302"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", "not completed"),
        (b"no HTTP\r\n\r\n", ""),
    ],
)
def test_an_answer_that_is_none_is_a_problem(answer: bytes, problem: str) -> None:
    async def ask_once() -> str:
        async with lying([answer]) as url:
            question = Question(url=url, timeout=5)
            async with open_session(question) as session:
                return (await ask(session, question, TASK)).problem

    found = asyncio.run(ask_once())
    assert found and problem in found and "\n" not in found


def test_endless_and_silent_servers_end() -> None:
    async def ask_once(answer: list[bytes], last: bytes) -> str:
        async with lying(answer, last) as url:
            question = Question(url=url, timeout=5)
            async with open_session(question) as session:
                return (await ask(session, question, TASK)).problem

    endless = asyncio.run(ask_once([b"HTTP/1.1 200 OK\r\n\r\n"], b"x" * 65536))
    assert endless == f"the answer is over {4 << 20} bytes"


MODELS = b'{"data": [{"id": "m\\u001b[31m"}]}'


def listed(parts: list[bytes], pause: float = 0.0) -> str:
    """What the first model of a server is called that answers in these parts."""

    async def run() -> str:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            question = Question(url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout=20)
            async with open_session(question) as session:
                return await first_model(session, question)

    return asyncio.run(run())


def test_a_list_of_models_may_come_in_pieces() -> None:
    answer = status("200 OK", body=MODELS)
    edge = len(answer) - len(MODELS) // 2
    assert listed([answer[:edge], answer[edge:]], pause=0.2) == "m\ufffd[31m", "nothing that a terminal would obey"


@pytest.mark.parametrize("said", [b"[" * 50_000, b" " * (5 << 20), b"[]"])
def test_a_list_of_models_may_be_none(said: bytes) -> None:
    with pytest.raises(InputError, match=r"lists no model|over 4194304 bytes"):
        listed([status("200 OK", body=said)])


def test_keys_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TABSTOP_EVAL_API_KEY", "secret")

    async def headers(question: Question) -> str:
        async with open_session(question) as session:
            return session.headers["authorization"]

    question = Question(url="http://127.0.0.1:8000/v1/", healing="on", is_line=True)
    check_question(question)
    assert asyncio.run(headers(question)) == "Bearer secret" and question.base == "http://127.0.0.1:8000"
    assert question.body(TASK) == {
        "prompt": "p", "suffix": "s", "max_tokens": 64, "temperature": 0.0, "seed": 0, "token_healing": True,
        "stop": ["\n"],
    }  # fmt: skip
