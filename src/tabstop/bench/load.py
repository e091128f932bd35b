"""Runs sessions against one endpoint inside one worker process: open loop (given send times) or closed loop (slots).

Send times are absolute: a late request does not delay the next one, and its lateness is in its record. Knows nothing of
other processes, files or metrics.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from tabstop.bench.client import Client, Endpoint, monotonic_since, open_session, prepare, with_answer
from tabstop.bench.records import ClientHealth, Record, Session

Report = Callable[[Record], None]


class Job(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A worker's share of a run."""

    endpoint: Endpoint
    sessions: list[Session]
    concurrency: int | None = None  # slots of this worker in a closed loop; None: open loop
    first_slot: int = 0  # of this worker among all slots, for the ramp
    num_slots: int = 1  # of all workers
    rest: float = 0.0  # mean time that a slot waits between sessions. unit: seconds
    seed: int = 0  # of the rests
    ramp: float = 0.0  # all slots are started evenly over this time. unit: seconds
    duration: float | None = None  # no new session is begun after it. unit: seconds


class Pacer:
    """Wakes coroutines at absolute times to within about 0.1 ms (asyncio rounds its own timers up to 1 ms)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="pacer", daemon=True)
        self._thread.start()

    async def until(self, due: float) -> None:
        """`due` is a time.monotonic value; returns at once if it has passed."""
        if due <= time.monotonic():
            return
        future = self._loop.create_future()
        with self._condition:
            heapq.heappush(self._due, (due, next(self._numbers), future))
            self._condition.notify()
        await future

    def close(self) -> None:
        with self._condition:
            self._is_open = False
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._condition:
            while self._is_open:
                if not self._due:
                    self._condition.wait()
                elif (left := self._due[0][0] - time.monotonic()) > 0:
                    self._condition.wait(left)
                else:
                    future = heapq.heappop(self._due)[2]
                    self._loop.call_soon_threadsafe(_wake, future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class LoadRunner:
    """One job. Records go to `report` as soon as they are complete. `start` is set before run()."""

    def __init__(self, job: Job, client: Client, pacer: Pacer, report: Report) -> None:
        self.job = job
        self.start = 0.0  # the run's zero, a time.monotonic value, the same for all workers
        self.client = client
        self.pacer = pacer
        self.report = report
        self.random = random.Random(f"{job.seed}/{job.first_slot}")
        self.background: set[asyncio.Task[Record]] = set()
        self.prepared = {  # encoded before the clock starts; chat answers are only known later
            (session.index, number): prepare(job.endpoint, client.dialect, turn)
            for session in job.sessions
            for number, turn in enumerate(session.turns)
            if not turn.carries_answer
        }

    async def run(self) -> None:
        if self.job.concurrency is None:
            await self._open_loop()
        else:
            await self._closed_loop(self.job.concurrency)
        if self.background:
            await asyncio.wait(self.background)

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for session in sorted(self.job.sessions, key=lambda s: s.start or 0.0):
                intended = session.start or 0.0
                if self.job.duration is not None and intended > self.job.duration:
                    break
                await self.pacer.until(self.start + intended)
                group.create_task(self._play(session, intended))

    async def _closed_loop(self, concurrency: int) -> None:
        waiting = iter(self.job.sessions)
        async with asyncio.TaskGroup() as group:
            for slot in range(concurrency):
                position = (self.job.first_slot + slot) / max(1, self.job.num_slots)
                group.create_task(self._slot(waiting, self.job.ramp * position))

    async def _slot(self, waiting: Iterator[Session], begin: float) -> None:
        await self.pacer.until(self.start + begin)
        free = self.client.now()  # a slot's first request is due when the slot exists; later ones when it is free
        for session in waiting:
            if free > (math.inf if self.job.duration is None else self.job.duration):
                return
            await self._play(session, free)
            free = self.client.now()
            if self.job.rest:
                free += self.random.expovariate(1 / self.job.rest)
                await self.pacer.until(self.start + free)

    async def _play(self, session: Session, intended: float) -> None:
        """The session's turns. A turn that supersedes starts by the clock and cancels the one before."""
        running: asyncio.Task[Record] | None = None
        previous: Record | None = None
        asked = session.turns[0]
        for number, turn in enumerate(session.turns):
            if number:
                if turn.supersedes:
                    intended += turn.delay
                else:
                    previous = await running if running else None
                    intended = self.client.now() + turn.delay
                await self.pacer.until(self.start + intended)
                if turn.supersedes and running is not None:
                    running.cancel()
            record = _blank(session, number, intended)
            record.is_whole = not self.job.endpoint.sampling.stream
            prepared = self.prepared.get((session.index, number))
            if prepared is None:
                asked = with_answer(turn, asked, previous.text if previous else "")
                prepared = prepare(self.job.endpoint, self.client.dialect, asked)
            running = asyncio.create_task(self.client.perform(prepared, record))
            running.add_done_callback(lambda _, done=record: self.report(done))  # type: ignore[misc]
            self.background.add(running)
            running.add_done_callback(self.background.discard)
        if running is not None:
            await asyncio.wait([running])


def _blank(session: Session, number: int, intended: float) -> Record:
    turn = session.turns[number]
    return Record(
        session=session.index,
        turn=number,
        num_turns=len(session.turns),
        kind=turn.kind,
        intended=intended,
        sent=intended,
        ended=intended,
        max_tokens=turn.max_tokens,
        expected_prompt_tokens=turn.num_prompt_tokens,
    )


async def run_job(job: Job, report: Report, wait_for_start: Callable[[], float]) -> ClientHealth:
    """The whole job in this process; returns what it cost the client.

    `wait_for_start` is called when all requests are encoded; it returns the run's zero (time.monotonic).
    """
    async with open_session(job.endpoint) as session:
        pacer = Pacer(asyncio.get_running_loop())
        client = Client(job.endpoint, session, monotonic_since(0.0))
        runner = LoadRunner(job, client, pacer, report)
        runner.start = wait_for_start()
        client.now = monotonic_since(runner.start)
        lags: list[float] = []
        await pacer.until(runner.start)
        probe = asyncio.create_task(_watch_loop(lags))
        began, cpu = time.monotonic(), time.process_time()
        try:
            await runner.run()
        finally:
            probe.cancel()
            pacer.close()
        wall = max(1e-6, time.monotonic() - began)
        lags.sort()
        return ClientHealth(
            cpu_share=(time.process_time() - cpu) / wall,
            loop_lag_p99=lags[math.ceil(0.99 * len(lags)) - 1] if lags else 0.0,
            num_bytes=client.num_bytes,
        )


async def _watch_loop(lags: list[float], interval: float = 0.02) -> None:
    """How late the event loop runs: what it adds to any arrival stamp at worst."""
    while True:
        due = time.monotonic() + interval
        await asyncio.sleep(interval)
        lags.append(max(0.0, time.monotonic() - due))
