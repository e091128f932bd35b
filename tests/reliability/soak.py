"""Mixed traffic for a long time: `python -m tests.reliability.soak --minutes 30`.

First the machine's capacity is measured (clients that ask again at once), then requests arrive at random at a share of
it: completions, chats, holes, schemas, streamed or not, one client in four leaving. Nothing may grow: memory, open
files, threads, the pool's slots; and the last minutes must be as fast as the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.reliability.client import End, send
from tests.reliability.crowd import Crowd, Tally, leaving
from tests.reliability.server import MEBIBYTE, MEMORY_SLACK, Server, serving, write_model

NUM_CLIENTS = 16
CAPACITY_SECONDS = 30.0
SAMPLE_SECONDS = 15.0
WINDOW_SECONDS = 300.0  # what is compared at both ends
OVERLOADED = {"overloaded", "429"}


@dataclass
class Sample:
    """What a server holds at a moment."""

    seconds: float  # since the start
    memory: dict[str, int]
    num_descriptors: int
    num_threads: int
    slots: dict[str, float]  # of the KV pool, by state

    @property
    def num_slots(self) -> float:
        return sum(self.slots.values())


def take_sample(server: Server, start: float) -> Sample:
    slots = {key: value for key, value in server.metrics().items() if key.startswith("tabstop_kv_cache_slots{")}
    num_threads = sum(child.num_threads() for child in server.children())
    return Sample(time.monotonic() - start, server.resident(), server.num_descriptors(), num_threads, slots)


@dataclass
class Soak:
    """A run: requests at a rate, and samples of the server meanwhile."""

    server: Server
    rate: float  # requests a second
    seconds: float
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    load: list[float] = field(default_factory=list)  # of the whole machine, one a sample
    most_open: list[int] = field(default_factory=lambda: [0])  # requests at once, up to each sample since the last

    def run(self, seed: int = 0) -> None:
        asyncio.run(self._run(random.Random(seed)))

    async def _run(self, generator: random.Random) -> None:
        start = time.monotonic()
        sampling = asyncio.create_task(self._sample(start))
        tasks: set[asyncio.Task[None]] = set()
        due = start
        while due < start + self.seconds:
            due += generator.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._ask(generator))
            tasks.add(task)
            self.most_open[-1] = max(self.most_open[-1], len(tasks))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling

    async def _ask(self, generator: random.Random) -> None:
        self.tally.add(await send(self.server.port, *leaving(generator)))

    async def _sample(self, start: float) -> None:
        while True:
            self.samples.append(await asyncio.to_thread(take_sample, self.server, start))
            self.load.append(psutil.getloadavg()[0])
            self.most_open.append(0)
            await asyncio.sleep(SAMPLE_SECONDS)

    # ---- what it shows

    def check(self) -> None:
        """Everything but times: those are another program's business on a shared machine."""
        self.tally.assert_each_ended_once()
        assert set(self.tally.errors) <= OVERLOADED, self.tally.errors
        self.server.assert_idle()
        totals = {sample.num_slots for sample in self.samples if sample.slots}
        assert len(totals) == 1, f"the parts of the KV pool do not add up: {totals}"
        for name, bytes_grown in self.growth().items():
            assert bytes_grown < MEMORY_SLACK, f"{name} grew by {bytes_grown / MEBIBYTE:.1f} MiB"

    def growth(self) -> dict[str, int]:
        """Of memory, from the median of the first quarter to that of the last, in bytes."""
        quarter = max(1, len(self.samples) // 4)
        first, last = self.samples[:quarter], self.samples[-quarter:]
        return {name: int(_median(last, name) - _median(first, name)) for name in self.samples[0].memory}

    def report(self) -> str:
        """Lines for people."""
        start, end = self.tally.ends[0].sent, self.tally.ends[-1].sent
        window = min(WINDOW_SECONDS, (end - start) / 3)
        early = [one for one in self.tally.ends if one.sent < start + window]
        late = [one for one in self.tally.ends if one.sent > end - window]
        lines = [f"{len(self.tally.ends)} requests at {self.rate:.1f} a second: {dict(self.tally.kinds)}"]
        lines += [f"first {window:.0f} s: {_times(early)}", f"last {window:.0f} s: {_times(late)}"]
        grown = {name: f"{value / MEBIBYTE:+.1f} MiB" for name, value in self.growth().items()}
        first, last = self.samples[min(4, len(self.samples) - 1)], self.samples[-1]
        lines.append(f"memory {grown}; open files {first.num_descriptors} → {last.num_descriptors}")
        lines.append(f"threads {first.num_threads} → {last.num_threads}; slots of the pool always {last.num_slots:.0f}")
        quarter = len(self.samples) // 4 + 1
        open_early, open_late = max(self.most_open[:quarter]), max(self.most_open[quarter:], default=0)
        lines.append(f"most requests open at once: {open_early} in the first quarter, {open_late} later")
        lines.append(f"load of the machine {min(self.load):.1f} to {max(self.load):.1f}")
        return "\n".join(lines)


def _median(samples: list[Sample], name: str) -> float:
    return statistics.median(sample.memory[name] for sample in samples)


def _times(ends: list[End]) -> str:
    finished = [end for end in ends if end.kind == "finished" and end.first is not None]
    first = sorted((end.first or 0) - end.sent for end in finished)
    whole = sorted(end.ended - end.sent for end in finished)
    shown = [
        f"{name} median {_at(times, 50):.0f} ms, p95 {_at(times, 95):.0f} ms"
        for name, times in (("first byte", first), ("whole answer", whole))
    ]
    return f"{len(finished)} finished, {'; '.join(shown)}"


def _at(ordered: list[float], percent: int) -> float:
    """A percentile in milliseconds."""
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000 if ordered else 0.0


def capacity(server: Server, seconds: float) -> float:
    """Requests a second when NUM_CLIENTS ask again at once."""
    with Crowd(server.port, NUM_CLIENTS, leaving, seed=99) as crowd:
        crowd.wait_for(NUM_CLIENTS * 2)
        before, start = len(crowd.tally.ends), time.monotonic()
        time.sleep(seconds)
        rate = (len(crowd.tally.ends) - before) / (time.monotonic() - start)
    crowd.tally.assert_each_ended_once()
    return rate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=30.0)
    options.add_argument("--share", type=float, default=0.8, help="of the capacity")
    options.add_argument("--rate", type=float, default=None, help="requests a second, instead of a share")
    given = options.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(write_model(Path(folder) / "tiny"), "--log-level", "warning") as server,
    ):
        most = capacity(server, CAPACITY_SECONDS)
        print(f"capacity: {most:.1f} requests a second", flush=True)
        soak = Soak(server, given.rate or most * given.share, given.minutes * 60)
        soak.run()
        print(soak.report(), flush=True)
        soak.check()
        assert server.stop() == 0
        server.assert_nothing_left()


if __name__ == "__main__":
    main()
