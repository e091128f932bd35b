"""Client processes: a pool that outlives single runs, and the worker's main loop.

Frames on stdin and stdout are a 4-byte length and a msgpack struct. The parent keeps every record it has received, so
an interrupted run still has its results.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec

from tabstop.bench.client import Endpoint
from tabstop.bench.load import Job, run_job
from tabstop.bench.records import ClientHealth, Record, Session
from tabstop.errors import InternalError, TabstopError, from_code

START_DELAY = 0.05  # seconds from the last worker's being ready to time zero


class RecordFrame(msgspec.Struct, tag="record"):
    record: Record


class ReadyFrame(msgspec.Struct, tag="ready"):
    """All requests are encoded; the worker waits for the start time."""


class DoneFrame(msgspec.Struct, tag="done"):
    health: ClientHealth


class FailFrame(msgspec.Struct, tag="fail"):
    """An error that ends the run; `code` is a user error's, else ""."""

    message: str
    code: str = ""


Frame = RecordFrame | ReadyFrame | DoneFrame | FailFrame


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One run: who is asked, what, and when."""

    endpoint: Endpoint
    sessions: list[Session]
    concurrency: int | None = None
    ramp: float = 0.0
    rest: float = 0.0
    seed: int = 0
    duration: float | None = None


class RunResult(msgspec.Struct, kw_only=True):
    """Records in the order in which they ended."""

    records: list[Record]
    health: list[ClientHealth]
    start: float = 0.0  # the run's zero as a time.monotonic value
    is_interrupted: bool = False  # by Ctrl-C
    is_stopped: bool = False  # by the report function


def write_frame(stream: IO[bytes], value: object) -> None:
    data = msgspec.msgpack.encode(value)
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    size = int.from_bytes(header, "big")
    data = stream.read(size)
    return data if len(data) == size else None  # cut: the worker was killed while it wrote


class WorkerPool:
    """`with WorkerPool(2) as pool: pool.run(plan)`: processes are started once and used for every run."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> WorkerPool:
        command = [sys.executable, "-m", "tabstop.bench.workers"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(self.num_workers)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def run(self, plan: LoadPlan, report: Callable[[Record], bool | None] | None = None) -> RunResult:
        """Runs the plan to its end, to Ctrl-C, or until `report` returns True.

        In the last two cases the workers are replaced (open connections close) and what came so far is returned.
        """
        jobs = split(plan, self.num_workers)
        result = RunResult(records=[], health=[])
        num_busy = sum(bool(job.sessions) for job in jobs)
        start = _Start(num_busy)

        def take(record: Record) -> None:
            result.records.append(record)
            if report is not None and report(record) and not result.is_stopped:
                result.is_stopped = start.is_over = True
                self._kill()

        with ThreadPoolExecutor(self.num_workers) as threads:
            waits = [
                threads.submit(_drive, process, job, start, take)
                for process, job in zip(self._processes, jobs, strict=True)
                if job.sessions
            ]
            try:
                result.health = [wait.result() for wait in waits]
            except KeyboardInterrupt:
                result.is_interrupted = start.is_over = True
                self._kill()  # the drivers see the pipes end
        if result.is_interrupted or result.is_stopped:
            self.__exit__()
            self.__enter__()
        result.start = start.at
        for number, health in enumerate(result.health):
            health.worker = number
        return result


class _Start:
    """Time zero, agreed when the last worker is ready."""

    def __init__(self, num_workers: int) -> None:
        self.at = 0.0
        self.is_over = False  # the pool itself ends its workers
        self.barrier = threading.Barrier(num_workers, action=self._agree)

    def _agree(self) -> None:
        self.at = time.monotonic() + START_DELAY


def _drive(process: subprocess.Popen[bytes], job: Job, start: _Start, take: Callable[[Record], None]) -> ClientHealth:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # a dead worker is found below, at the end of its output
        write_frame(process.stdin, job)
    decode = msgspec.msgpack.Decoder(Frame).decode
    while (data := read_frame(process.stdout)) is not None:
        frame = decode(data)
        if isinstance(frame, RecordFrame):
            take(frame.record)
        elif isinstance(frame, ReadyFrame):
            try:
                start.barrier.wait()
            except threading.BrokenBarrierError:
                return ClientHealth()  # another worker failed, and says why
            write_frame(process.stdin, start.at)
        elif isinstance(frame, DoneFrame):
            return frame.health
        else:
            start.barrier.abort()
            raise from_code(frame.code, frame.message) if frame.code else InternalError(frame.message)
    start.barrier.abort()
    if not start.is_over:  # the kernel kills with the pool's own signal where memory ends
        raise InternalError(f"a benchmark worker died with code {process.wait()}: half a run is none")
    return ClientHealth()


def split(plan: LoadPlan, num_workers: int) -> list[Job]:
    """Sessions go round robin, so that each worker sees the whole run's rhythm; slots are shared out evenly.

    In a closed loop sessions go round the slots: a worker with fewer of them would else still have work when others,
    at the end of a short run, have none.
    """
    jobs, first_slot = [], 0
    for number in range(num_workers):
        slots, sessions = None, plan.sessions[number::num_workers]
        if plan.concurrency is not None:
            slots = plan.concurrency // num_workers + (number < plan.concurrency % num_workers)
            own = range(first_slot, first_slot + slots)
            sessions = [session for n, session in enumerate(plan.sessions) if n % plan.concurrency in own]
        jobs.append(
            Job(
                endpoint=plan.endpoint,
                sessions=sessions,
                concurrency=slots,
                first_slot=first_slot,
                num_slots=plan.concurrency or 1,
                ramp=plan.ramp,
                rest=plan.rest,
                seed=plan.seed,
                duration=plan.duration,
            )
        )
        first_slot += slots or 0
    return jobs


def main() -> None:
    """Reads jobs until stdin ends. SIGINT is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.setswitchinterval(0.0005)  # the pacer's thread must get the interpreter quickly
    gc.freeze()
    gc.disable()
    decode = msgspec.msgpack.Decoder(Job).decode
    frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()  # a full pipe must not stop the event loop
    threading.Thread(target=_write_all, args=(frames,), daemon=True).start()

    def wait_for_start() -> float:
        frames.put(ReadyFrame())
        return msgspec.msgpack.decode(read_frame(sys.stdin.buffer) or b"", type=float)

    while (data := read_frame(sys.stdin.buffer)) is not None:
        try:
            job = decode(data)
            health = asyncio.run(run_job(job, lambda record: frames.put(RecordFrame(record)), wait_for_start))
        except TabstopError as error:
            frames.put(FailFrame(error.message, error.code))
        except Exception as error:
            frames.put(FailFrame(f"a benchmark worker failed: {type(error).__name__}: {error}"))
        else:
            frames.put(DoneFrame(health))
        gc.collect()


def _write_all(frames: queue.SimpleQueue[Frame]) -> None:
    while True:
        write_frame(sys.stdout.buffer, frames.get())


if __name__ == "__main__":
    main()
