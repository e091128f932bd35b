"""The short forms of machine.py and blackhole.py, and what no run can show."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.reliability import blackhole, machine
from tests.reliability.server import ROOT, Server, serving, write_model

OPTIONS = ("--num-front-ends", "2")
IDLE_SECONDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("machine")


@pytest.fixture(scope="module")
def has_clock() -> list[Path]:
    """The file that sets the server's clock, if it can be set here."""
    return []


@pytest.fixture(scope="module")
def server(folder: Path, has_clock: list[Path]) -> Iterator[Server]:
    """One for all; the last thing it does is to leave nothing."""
    model = write_model(folder / "tiny")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError), machine.clock(folder) as offset:
            running = stack.enter_context(serving(model, *OPTIONS))
            has_clock.append(offset)
        if not has_clock:
            running = stack.enter_context(serving(model, *OPTIONS))
        yield running
        assert running.stop() == 0
        running.assert_nothing_left()


def has_limits() -> bool:
    return hasattr(psutil, "RLIMIT_NOFILE")


def test_a_clock_that_jumps_hurries_and_holds_nobody(server: Server, has_clock: list[Path]) -> None:
    if not has_clock:
        pytest.skip("there is no C compiler here to replace the clock with")
    tally = machine.jump(server, has_clock[0], 0.3)
    assert tally.kinds["finished"] > 20


def test_idle_processes_sleep(server: Server) -> None:
    """A heartbeat, a look at the engine's, its report: a few times a second each of them wakes."""
    server.assert_idle()
    before = {child: child.num_ctx_switches().voluntary for child in server.children()}
    time.sleep(IDLE_SECONDS)
    woken = {child.pid: child.num_ctx_switches().voluntary - number for child, number in before.items()}
    assert len(woken) == 3 and max(woken.values()) < 8 * IDLE_SECONDS, woken


@pytest.mark.skipif(not has_limits(), reason="limits of running processes are Linux's")
def test_without_descriptors_it_refuses_and_recovers(server: Server) -> None:
    num_answered = machine.without_files(server, 60)
    assert 0 < num_answered < 40


@pytest.mark.skipif(not has_limits(), reason="limits of running processes are Linux's")
def test_without_descriptors_for_a_new_front_end_the_other_serves_on(server: Server) -> None:
    machine.without_files_for_children(server)


def test_no_deadline_hangs_on_the_wall_clock() -> None:
    """It is asked for dates alone: whole seconds in an answer, a line of the log, a chat template."""
    dates = r"int\(time\.time\(\)\)|datetime\.now\([\w.]*\)\.(strftime|isoformat)"
    found = []
    for file in sorted((ROOT / "src/tabstop").rglob("*.py")):
        text = re.sub(dates, "", re.sub(r'"[^"\n]*"|#.*', "", file.read_text(encoding="utf-8")))
        if re.search(r"\btime\.time(_ns)?\(|datetime\.(now|utcnow|today)\(|CLOCK_REALTIME", text):
            found.append(file.name)
    assert found == []


def test_clients_that_vanish_are_missed() -> None:
    command = [sys.executable, "-m", "tests.reliability.blackhole", "--streams", "8"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    if done.returncode == blackhole.NOT_PERMITTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    assert "14 clients vanished" in done.stdout
