"""Clients by the thousand that leave at every point: `python -m tests.reliability.storms --times 10000`.

Before the first token, in the middle, at the end; with FIN, with RST, or without reading at all. Afterwards nothing of
them may be left: no slot of the KV pool, no text, no descriptor, no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.reliability.client import Patience, send
from tests.reliability.crowd import Tally
from tests.reliability.requests import Ask, draw_ask, long_stream
from tests.reliability.server import MEMORY_SLACK, Server, serving, until, write_model

AT_ONCE = 200
Storm = Callable[[random.Random], tuple[Ask, Patience]]


def cancelled(generator: random.Random) -> tuple[Ask, Patience]:
    """A request whose client goes: at once, after some reads, or at a random time, with or without a goodbye."""
    ask = long_stream(generator.choice((5, 200, 1500))) if generator.random() < 0.7 else draw_ask(generator)
    is_reset = generator.random() < 0.4
    if generator.random() < 0.5:
        return ask, Patience(generator.choice((0, 1, 2, 3, 8, 30)), is_reset)
    return ask, Patience(None, is_reset, seconds=generator.uniform(0, 1.5))


async def blow(port: int, times: int, storm: Storm, seed: int) -> Tally:
    """So many requests, AT_ONCE at a time."""
    generator, tally, left = random.Random(seed), Tally(), iter(range(times))

    async def ask_on() -> None:
        for _ in left:
            tally.add(await send(port, *storm(generator)))

    await asyncio.gather(*(ask_on() for _ in range(min(AT_ONCE, times))))
    return tally


def cancel_streams(server: Server, times: int, seed: int = 0) -> Tally:
    """A storm, and afterwards an idle server that still serves."""
    aborts = server.total("tabstop_aborts_total")
    tally = asyncio.run(blow(server.port, times, cancelled, seed))
    tally.assert_each_ended_once()
    assert len(tally.ends) == times and not tally.kinds["refused"], tally.kinds
    server.assert_idle()
    num_aborted = server.total("tabstop_aborts_total") - aborts
    num_left = sum(end.kind == "left" and end.first is not None for end in tally.ends)  # surely accepted
    assert num_aborted > num_left / 4, f"{num_aborted} aborts of {num_left}: what was left was computed to its end"
    assert server.status() == 200
    return tally


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--times", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(write_model(Path(folder) / "tiny"), "--num-front-ends", "2", "--log-level", "warning") as server,
    ):
        cancel_streams(server, max(AT_ONCE * 5, given.times // 10), given.seed + 1)
        memory, descriptors = server.resident(), server.num_descriptors()
        start, tally = time.monotonic(), Tally()
        for part in range(10):
            tally.ends += cancel_streams(server, given.times // 10, given.seed + 2 + part).ends
            print({name: f"{value >> 20} MiB" for name, value in server.resident().items()}, flush=True)
        seconds = time.monotonic() - start
        until(lambda: server.num_descriptors() <= descriptors, "closed descriptors")
        growth = {name: value - memory[name] for name, value in server.resident().items()}
        print(f"{given.times} requests in {seconds:.0f} s: {dict(tally.kinds)}, errors {dict(tally.errors)}")
        print(f"memory grew by {growth} bytes; descriptors before {descriptors}, after {server.num_descriptors()}")
        print({name: value for name, value in server.metrics().items() if "aborts" in name or "finished{" in name})
        assert all(value < MEMORY_SLACK for value in growth.values()), "memory grew"
        assert server.stop() == 0
        server.assert_nothing_left()


if __name__ == "__main__":
    main()
