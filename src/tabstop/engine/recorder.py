"""Which requests the engine has in hand, where it can still be read when the engine is gone: one of them may be why.

A file of the run folder with numbers only. The log lines of answers that failed tell which request each of them was.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from pathlib import Path

from tabstop.mapped import map_reserved
from tabstop.types import RequestId

log = logging.getLogger(__name__)

MAX_REQUESTS = 4096
"""More are not written down."""

COUNT, ENTRY = struct.Struct("<I"), struct.Struct("<IQ")
NUM_BYTES = COUNT.size + MAX_REQUESTS * ENTRY.size
FILE = "in-hand"


class Recorder:
    """The engine's end."""

    def __init__(self, folder: str) -> None:
        """Makes the file. Raises OSError when there is no room for it."""
        self._bytes = map_reserved(Path(folder) / FILE, NUM_BYTES)

    def note(self, requests: Sequence[RequestId]) -> None:
        """These are in hand, and no others."""
        written = requests[:MAX_REQUESTS]
        COUNT.pack_into(self._bytes, 0, 0)
        for index, request_id in enumerate(written):
            ENTRY.pack_into(self._bytes, COUNT.size + index * ENTRY.size, *request_id)
        COUNT.pack_into(self._bytes, 0, len(written))


def read(folder: str) -> list[RequestId]:
    """What a dead engine had in hand. Nothing when it wrote nothing, or nonsense."""
    try:
        data = (Path(folder) / FILE).read_bytes()
    except OSError:
        return []
    if len(data) != NUM_BYTES or (count := COUNT.unpack_from(data)[0]) > MAX_REQUESTS:
        return []
    return [ENTRY.unpack_from(data, COUNT.size + index * ENTRY.size) for index in range(count)]


def name_of(request_id: RequestId) -> str:
    """As logs write it: the front end's number and the request's own."""
    return "-".join(map(str, request_id))
