"""Many clients at once, in a thread of their own, and the tally of how their requests ended."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.reliability.client import STAYS, End, Patience, send
from tests.reliability.requests import Ask, draw_ask

REFUSED_PAUSE = 0.1  # seconds before a client knocks again


@dataclass
class Tally:
    """What became of requests. Everything that is neither finished nor an error nor left by its client is a loss."""

    ends: list[End] = field(default_factory=list)

    def add(self, end: End) -> None:
        self.ends.append(end)

    @property
    def kinds(self) -> Counter[str]:
        return Counter(end.kind for end in self.ends)

    @property
    def errors(self) -> Counter[str]:
        """Errors by their code."""
        return Counter(end.detail for end in self.ends if end.kind == "error")

    def assert_each_ended_once(self, excuse: Callable[[End], bool] = lambda end: False) -> None:
        """But for the lost ones that `excuse` takes: they are counted as excused from now on."""
        for end in self.ends:
            if end.kind == "lost" and excuse(end):
                end.kind = "excused"
        bad = [end for end in self.ends if end.kind in ("lost", "wrong")]
        assert not bad, f"{len(bad)} of {len(self.ends)} requests have not ended exactly once: {bad[:5]}"


def never_accepted(since: float) -> Callable[[End], bool]:
    """Excuses who began after a fault and got no byte: the system's queue held that connection when the port closed."""
    return lambda end: end.num_bytes == 0 and end.sent > since


Draw = Callable[[random.Random], tuple[Ask, Patience]]


def staying(generator: random.Random) -> tuple[Ask, Patience]:
    """Any request, read to its end."""
    return draw_ask(generator), STAYS


def leaving(generator: random.Random) -> tuple[Ask, Patience]:
    """Any request; one in four clients goes before it has ended."""
    patience = STAYS
    if generator.random() < 0.25:
        patience = Patience(generator.choice((0, 1, 2, 5)), generator.random() < 0.3)
    return draw_ask(generator), patience


class Crowd:
    """`with Crowd(port, 16) as crowd:` keeps 16 clients asking until the block ends; then `crowd.tally` is whole."""

    def __init__(self, port: int, num_clients: int, draw: Draw = staying, seed: int = 0, *, pause: float = 0.0) -> None:
        """`pause`: seconds between two requests of a client."""
        self.port = port
        self._pause = pause
        self.tally = Tally()
        self._num_clients = num_clients
        self._draw = draw
        self._generator = random.Random(seed)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="crowd")

    def __enter__(self) -> Crowd:
        self._thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        self.finish()

    def stop_asking(self) -> None:
        """What is open goes on to its end."""
        self._stopping.set()

    def finish(self) -> None:
        """Waits for every open request."""
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def wait_for(self, num_ends: int, patience: float = 60.0) -> None:
        """Until so many requests have ended: the server is under load."""
        deadline = time.monotonic() + patience
        while len(self.tally.ends) < num_ends:
            assert time.monotonic() < deadline and self._thread.is_alive(), (
                f"only {self.tally.kinds} within {patience} s"
            )
            time.sleep(0.01)

    def _run(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except BaseException as error:
            self._failure = error

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask_on() for _ in range(self._num_clients)))

    async def _ask_on(self) -> None:
        while not self._stopping.is_set():
            end = await send(self.port, *self._draw(self._generator))
            self.tally.add(end)
            await asyncio.sleep(REFUSED_PAUSE if end.kind in ("refused", "error") else self._pause)
