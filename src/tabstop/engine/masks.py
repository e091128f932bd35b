"""Fills the masks of constrained rows on threads of its own, so that none holds the engine's loop for long.

A constraint may come from a client that wants it to be slow. Code that fills a mask cannot be stopped, but left: its
row gets no mask, its request ends, and the thread ends when it is done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from tabstop.device import num_cores
from tabstop.errors import InputError

Job = Callable[[], None]

LOOK_SECONDS = 0.01
"""How often it is looked whether a job takes too long."""

MAX_THREADS = 8
"""And at most half of the cores: on a CPU the step runs meanwhile."""

JOBS_PER_THREAD = 8
"""Fewer are done sooner by one thread than handed to a second one."""


class _Round:
    """The jobs of one step; threads take the next one when they are done."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.left = deque(range(len(jobs)))
        self.errors: list[Exception | None] = [None] * len(jobs)
        self.num_open = len(jobs)
        self.lock = threading.Lock()
        self.done = threading.Event()

    def end(self, index: int, error: Exception | None) -> None:
        with self.lock:
            self.errors[index] = error
            self.num_open -= 1
            if not self.num_open:
                self.done.set()


class _Filler:
    """A thread."""

    def __init__(self) -> None:
        self.rounds: SimpleQueue[_Round | None] = SimpleQueue()
        self.lock = threading.Lock()
        self.job: tuple[_Round, int, float] | None = None  # with the thread's time at its start
        self.is_left = False
        self._thread = threading.Thread(target=self._run, name="masks", daemon=True)
        self._thread.start()

    def seconds(self) -> float:
        """What the job has taken of the processor; call it with the lock and a job. Waiting for a core is no fault."""
        assert self.job is not None and self._thread.ident is not None
        clock = getattr(time, "pthread_getcpuclockid", None)
        if clock is None:  # not every system tells
            return time.monotonic() - self.job[2]
        return time.clock_gettime(clock(self._thread.ident)) - self.job[2]

    def _run(self) -> None:
        while not self.is_left and (current := self.rounds.get()) is not None:
            while not self.is_left and (index := _next(current)) is not None:
                self._do(current, index)

    def _do(self, current: _Round, index: int) -> None:
        with self.lock:
            start = time.thread_time() if hasattr(time, "pthread_getcpuclockid") else time.monotonic()
            self.job = (current, index, start)
        error = None
        try:
            current.jobs[index]()
        except Exception as raised:
            error = raised
        with self.lock:
            self.job = None
            if not self.is_left:
                current.end(index, error)


def _next(current: _Round) -> int | None:
    try:
        return current.left.popleft()
    except IndexError:
        return None


class MaskFillers:
    """A few threads, and one in place of each that is left behind."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: of processor time, what one job may take."""
        self._seconds = seconds
        self._num_threads = max(1, min(MAX_THREADS, num_cores() // 2))
        self._fillers: list[_Filler] = []  # started when they are needed

    def run(self, jobs: Sequence[Job]) -> list[Exception | None]:
        """Does all jobs, each on one thread; what they raised. A job that takes too long goes on unattended."""
        current = _Round(jobs)
        num_threads = min(self._num_threads, -(-len(jobs) // JOBS_PER_THREAD))
        self._fillers += [_Filler() for _ in range(num_threads - len(self._fillers))]
        for filler in self._fillers[:num_threads]:
            filler.rounds.put(current)
        while not current.done.wait(LOOK_SECONDS):
            for place, filler in enumerate(self._fillers):
                if self._leave(filler, current):
                    self._fillers[place] = _Filler()
                    self._fillers[place].rounds.put(current)
        return current.errors

    def _leave(self, filler: _Filler, current: _Round) -> bool:
        """Gives a thread up whose job takes too long."""
        with filler.lock:
            if filler.job is None or filler.seconds() <= self._seconds:
                return False
            filler.is_left = True
            error = InputError(f"the grammar takes over {self._seconds:g} seconds for one token; make it simpler")
            current.end(filler.job[1], error)
            return True

    def close(self) -> None:
        for filler in self._fillers:
            filler.rounds.put(None)
