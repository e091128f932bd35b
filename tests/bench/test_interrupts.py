"""Ctrl-C at bad moments, and workers that die: half a run is never taken for a whole one, and no report is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tabstop.bench.golden import Behaviour
from tabstop.bench.records import Record, Session, Turn
from tabstop.bench.run import RunSetup, execute, warm_up
from tabstop.bench.selftest import golden_endpoint, golden_process
from tabstop.bench.workers import LoadPlan, WorkerPool, read_frame, write_frame
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.prompts import TextMaker
from tabstop.errors import InternalError
from tabstop.exits import fails_in_one_line

SESSIONS = [Session(index=i, start=0.0, turns=[Turn(text=f" {i}", max_tokens=2)]) for i in range(9)]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_worker_that_was_killed_leaves_no_whole_run() -> None:
    """By the kernel, for its memory: with the same signal that the pool itself uses."""
    with golden_process(Behaviour(ttft=30)) as url, WorkerPool(1) as pool:
        victim = pool._processes[0]
        threading.Timer(1.0, victim.kill).start()
        with pytest.raises(InternalError, match="died with code -9"):
            pool.run(LoadPlan(endpoint=golden_endpoint(url, "openai-completions"), sessions=SESSIONS))
        with pytest.raises(InternalError, match="died with code -9"):  # and a dead one is not written to in vain
            pool.run(LoadPlan(endpoint=golden_endpoint(url, "openai-completions"), sessions=SESSIONS))


def test_a_frame_that_was_cut_is_none(tmp_path: Path) -> None:
    with (tmp_path / "frames").open("w+b") as file:
        write_frame(file, "a whole frame")
        file.truncate(9)
        file.seek(0)
        assert read_frame(file) is None


def test_an_interrupt_in_the_warm_up_ends_the_command() -> None:
    with golden_process(Behaviour(ttft=30)) as url, WorkerPool(1) as pool:
        threading.Timer(0.5, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            warm_up(pool, golden_endpoint(url, "openai-completions"), RunSetup(), TextMaker(len))


def test_an_interrupt_while_answers_are_counted_again_keeps_them() -> None:
    def count(text: str) -> int:
        raise KeyboardInterrupt

    setup = RunSetup(workload=WorkloadSpec(name="humaneval", num_requests=4, output_tokens="3"))
    with golden_process(Behaviour(ttft=0.01, usage=False, running_usage=False)) as url, WorkerPool(1) as pool:
        outcome = execute(pool, golden_endpoint(url, "openai-completions"), setup, TextMaker(count))
    assert outcome.is_interrupted and len(outcome.records) == 4


def test_a_second_interrupt_does_not_lose_the_report() -> None:
    written: list[Record | str] = []

    def command(first: Callable[[], None]) -> None:
        with pytest.raises(KeyboardInterrupt):
            first()
        interrupt()
        written.append("report")

    before = signal.getsignal(signal.SIGINT)
    fails_in_one_line(command)(interrupt)
    assert written == ["report"] and signal.getsignal(signal.SIGINT) is before
