"""Programs that nobody should trust: each has one verdict, in bounded time, and touches nothing."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from tabstop.evaluation import PASSED
from tabstop.evaluation.infilling import program
from tabstop.evaluation.programs import Limits, run_program
from tabstop.evaluation.tasks import DATA, SETS, load_tasks

QUICK = Limits(seconds=1.0, memory=256 << 20)


def verdict(source: str, limits: Limits = QUICK) -> str:
    return asyncio.run(run_program(source, limits))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\nassert x == 1", PASSED),
        ("print('x' * 1_000_000)\nimport sys\nsys.stderr.write('y' * 1_000_000)", PASSED),
        ("assert False", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("\ud800", "SyntaxError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("import sys\nsys.exit(0)", "exit"),
        ("quit = exit = None\nraise SystemExit", "exit"),
        ("import os\nos._exit(0)", "exit"),
        ("class Passed(Exception): pass\nPassed.__name__ = '\\x1b[31m'\nraise Passed", "exit"),
        ("import os\nfor n in range(3, 9):\n    try: os.write(n, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
         "exit"),
        ("import os\nwhile True:\n    for n in range(3, 9):\n        try: os.write(n, b'x' * 999)\n"
         "        except OSError: pass", "output"),
        ("import signal\nsignal.raise_signal(9)", "killed"),
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("while True:\n    try: raise KeyboardInterrupt\n    except BaseException: pass", "timeout"),
    ],
)  # fmt: skip
def test_every_program_has_one_verdict(source: str, expected: str) -> None:
    start = time.monotonic()
    assert verdict(source) == expected
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.fork()",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.remove('program.py')",
        "open('new', 'w')",
        "import os\nos.open('new', os.O_CREAT | os.O_WRONLY)",
        "import socket\nsocket.create_connection(('127.0.0.1', 80))",
        "import subprocess\nsubprocess.run(['true'])",
        "import ctypes\nctypes.CDLL(None)",
        "import os\nos.open('program.py', os.O_RDONLY | os.O_TRUNC)",
        "import os\nos.open('new', os.O_RDONLY | os.O_CREAT)",
        "import os\nos.mkdir('new')",
        "import os\nos.mkfifo('new')",
        "import sqlite3\nsqlite3.connect('new')",
        "import os\nopen(f'/proc/{os.getppid()}/environ')",
        "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_CPU)",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)",
        "import threading\nthreading.Thread(target=print).start()",
        "import _posixsubprocess as p\np.fork_exec()",
    ],
)
def test_what_no_test_needs_is_refused(source: str) -> None:
    assert verdict(source) == "PermissionError"


def test_limits_hold_where_the_hook_does_not(tmp_path: Path) -> None:
    """What a program sees of its own limits, its folder and its environment."""
    source = (
        "import os, resource as r\n"
        "assert r.getrlimit(r.RLIMIT_AS) == (256 << 20, 256 << 20), 1\n"
        "assert r.getrlimit(r.RLIMIT_NPROC)[1] == r.getrlimit(r.RLIMIT_CORE)[1] == 0\n"
        "assert r.getrlimit(r.RLIMIT_FSIZE)[1] == 0 and r.getrlimit(r.RLIMIT_CPU)[1] == 2\n"
        f"assert os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR'] != {os.getcwd()!r}\n"
        "assert set(os.environ) <= {'HOME', 'TMPDIR', 'PATH', 'LANG', 'LC_CTYPE'}, os.environ\n"
        "assert os.getsid(0) == os.getpgid(0) == os.getpid()\n"
        "assert os.listdir() == ['program.py']"
    )
    assert verdict(source) == PASSED


def test_cancelling_kills_the_program(tmp_path: Path) -> None:
    async def run() -> int:
        task = asyncio.create_task(run_program(f"open({str(tmp_path)!r})", Limits(seconds=60)))
        assert await task == "IsADirectoryError"
        before = set(os.listdir("/proc"))
        task = asyncio.create_task(run_program("while True: pass", Limits(seconds=60)))
        await asyncio.sleep(0.3)
        (pid,) = [int(n) for n in set(os.listdir("/proc")) - before if n.isdigit() and is_child(int(n))]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return pid

    pid = asyncio.run(run())
    assert not is_child(pid)


def is_child(pid: int) -> bool:
    try:
        return "child.py" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("name", SETS)
def test_the_sets_own_solutions_pass_and_nothing_else(name: str) -> None:
    tasks = load_tasks(DATA / SETS[name].file)
    assert len(tasks) == {"single-line": 1033, "random-span-light": 164}[name]
    assert all(task.canonical_solution.count("\n") == 1 for task in tasks) == SETS[name].is_line
    for task in tasks[:: len(tasks) // 10]:
        assert verdict(program(task, task.canonical_solution)) == PASSED, task.task_id
        assert verdict(program(task, "    this is no Python\n")) in ("SyntaxError", "IndentationError"), task.task_id
