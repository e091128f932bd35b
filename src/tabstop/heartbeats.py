"""Signs of life of front ends: a byte for each of them, in a file of the run folder that all of them map.

A front end changes its byte each second, on its event loop: one that is frozen, or whose loop is held up, no longer
does. The supervisor sees that without asking, and without trusting what stands there: it compares a byte with the one
of a second before, and no more. Knows no process.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from tabstop.mapped import map_reserved

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0

NEVER = 0
"""The byte of a front end that is still starting: nobody can say how long that takes."""


class Heartbeats:
    """The bytes, by place of the front ends."""

    def __init__(self, path: Path, num_places: int) -> None:
        """Makes the file unless it is there. Raises OSError when there is no room for it."""
        self._bytes = map_reserved(path, num_places)

    def forget(self, place: int) -> None:
        """A new front end begins here."""
        self._bytes[place] = NEVER

    def beat(self, place: int) -> None:
        self._bytes[place] = self._bytes[place] % 255 + 1

    def at(self, place: int) -> int:
        return self._bytes[place]


class Silence:
    """How long a front end has not changed its byte, by the clock of who asks each BEAT_SECONDS.

    Each asking counts for one beat, however late it comes: on a machine that starves or was asleep, who asks starves
    like the front end, and no time has passed.
    """

    def __init__(self) -> None:
        self._last = NEVER
        self._seconds = 0.0

    def after(self, beat: int) -> float:
        """Seconds of silence, given what stands there now."""
        if beat == NEVER or beat != self._last:
            self._last, self._seconds = beat, 0.0
        else:
            self._seconds += BEAT_SECONDS
        return self._seconds


def open_heartbeats(folder: str, num_places: int) -> Heartbeats | None:
    """Those of a run folder; None, with a warning, when the disk has no room for them."""
    try:
        return Heartbeats(Path(folder) / "heartbeats", num_places)
    except OSError as error:
        log.warning("no room for heartbeats (%s): a front end that freezes is not noticed", error.strerror)
        return None


async def beat(heartbeats: Heartbeats | None, place: int) -> None:
    """Beats until it is cancelled."""
    while heartbeats is not None:
        heartbeats.beat(place)
        await asyncio.sleep(BEAT_SECONDS)


async def wait_silent(heartbeats: Heartbeats | None, place: int, limit: float) -> None:
    """Until a front end has been silent for more than `limit` seconds; for ever when nothing can be seen."""
    silence = Silence()
    while heartbeats is None or silence.after(heartbeats.at(place)) <= limit:
        await asyncio.sleep(BEAT_SECONDS)
