"""How much a key may ask for, and how much this front end takes on: counted, and refused before anything is read.

Every POST counts. Front ends count together: for each key there is a small file in the run folder that all of them
map, so a ceiling is the server's, whichever front end a connection got to. Nothing is locked. Of what two front ends
spend within the same microsecond one part may be lost, and each may let one request too many pass at once; a front end
that dies leaves no lock behind, and its successor sets its open requests back to none.
"""

from __future__ import annotations

import logging
import math
import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tabstop.api.errors import error_response
from tabstop.errors import OverloadedError, RateLimitError, TabstopError
from tabstop.keys import Key
from tabstop.mapped import map_reserved

log = logging.getLogger(__name__)

MINUTE = 60.0
CELL_BYTES = 8
NUM_CLOCKS = 2
"""The cells of a key: requests' and tokens' clocks, then the open requests of each front end."""


class Counts:
    """The cells of each key: doubles that several processes share."""

    def __init__(self, folder: Path | None = None, place: int = 0, num_front_ends: int = 1) -> None:
        """`folder` None: this process counts alone. `place`: of this front end among them; a successor takes it."""
        self._folder = folder
        self._column = NUM_CLOCKS + place
        self._num_bytes = CELL_BYTES * (NUM_CLOCKS + num_front_ends)
        self._cells: dict[str, memoryview[float]] = {}

    def of(self, key: Key) -> KeyCounts:
        cells = self._cells.get(key.sha256)
        if cells is None:
            cells = self._cells[key.sha256] = self._map(key.sha256)
            cells[self._column] = 0.0
        return KeyCounts(key, cells, self._column)

    def _map(self, name: str) -> memoryview[float]:
        if self._folder is not None:
            try:
                return memoryview(map_reserved(self._folder / name, self._num_bytes)).cast("d")
            except OSError as error:
                log.warning("no room to share a key's counts (%s): each front end counts alone", error.strerror)
        return memoryview(mmap.mmap(-1, self._num_bytes)).cast("d")


@dataclass(slots=True)
class Allowance:
    """So many units a minute, a minute's worth of them at once: the generic cell rate algorithm (ITU-T I.371).

    Its whole state is a time: until when what was spent keeps it busy. It may be spent into debt.
    """

    per_minute: float
    cells: memoryview[float]
    index: int

    def busy(self, now: float) -> float:
        """Seconds until all of it is there again."""
        return max(0.0, self.cells[self.index] - now)

    def wait(self, now: float, units: float) -> float:
        """Seconds until so many units are there."""
        interval = MINUTE / self.per_minute
        return self.busy(now) + units * interval - max(MINUTE, interval)

    def spend(self, now: float, units: float) -> None:
        self.cells[self.index] = now + self.busy(now) + units * MINUTE / self.per_minute

    def left(self, now: float) -> int:
        """Whole units that could be spent now."""
        burst = max(MINUTE, MINUTE / self.per_minute)
        return max(0, math.floor((burst - self.busy(now)) * self.per_minute / MINUTE + 1e-6))


class KeyCounts:
    """What one key has spent and has open, over all front ends."""

    def __init__(self, key: Key, cells: memoryview[float], column: int) -> None:
        self._key = key
        self._cells = cells
        self._column = column
        self._allowances = {
            name: Allowance(rate, cells, index)
            for index, (name, rate) in enumerate(
                (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute))
            )
            if rate is not None
        }

    def enter(self, now: float) -> None:
        """Begins a request. Raises RateLimitError."""
        most = self._key.max_concurrent
        if most is not None and sum(self._cells[NUM_CLOCKS:]) >= most:
            raise RateLimitError(f"this key may have {most} requests open at once; wait for one to end", retry_after=1)
        for name, allowance in self._allowances.items():
            wait = allowance.wait(now, 1 if name == "requests" else 0)
            if wait > 0:
                raise RateLimitError(
                    f"this key may spend {_number(allowance.per_minute)} {name} a minute; retry in {math.ceil(wait)} s",
                    retry_after=math.ceil(wait),
                )
        if "requests" in self._allowances:
            self._allowances["requests"].spend(now, 1)
        self._cells[self._column] += 1

    def leave(self) -> None:
        self._cells[self._column] -= 1

    def spend_tokens(self, num_tokens: int) -> None:
        """Of a prompt or a completion, as they come; what is over the ceiling keeps later requests waiting."""
        if "tokens" in self._allowances:
            self._allowances["tokens"].spend(time.monotonic(), num_tokens)

    def headers(self, now: float) -> Iterator[tuple[str, str]]:
        """x-ratelimit-*, as OpenAI has them."""
        for name, allowance in self._allowances.items():
            yield f"x-ratelimit-limit-{name}", _number(allowance.per_minute)
            yield f"x-ratelimit-remaining-{name}", str(allowance.left(now))
            yield f"x-ratelimit-reset-{name}", f"{allowance.busy(now):.3f}s"


class Ceilings:
    """Stands behind the guard: counts every POST from its head to the end of its answer."""

    def __init__(self, app: ASGIApp, counts: Counts, max_open: int) -> None:
        """`max_open`: requests of this front end at once, whosever they are."""
        self._app = app
        self._counts = counts
        self._max_open = max_open
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = scope["state"]["key"]
        counts = None if key is None else self._counts.of(key)
        if counts is not None:
            scope["state"]["spend_tokens"] = counts.spend_tokens
            send = _with_headers(counts, send)
        try:
            self._enter(counts)
        except TabstopError as error:
            await error_response(error, scope)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1
            if counts is not None:
                counts.leave()

    def _enter(self, counts: KeyCounts | None) -> None:
        """Raises OverloadedError or RateLimitError."""
        if self._num_open >= self._max_open:
            message = f"{self._max_open} requests are open already, and no front end takes more; retry later"
            raise OverloadedError(message, retry_after=1)
        if counts is not None:
            counts.enter(time.monotonic())
        self._num_open += 1


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else str(value)


def _with_headers(counts: KeyCounts, send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in counts.headers(time.monotonic()):
                headers[name] = value
        await send(message)

    return send_with_headers
