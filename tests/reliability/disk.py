"""Nowhere to write logs to: `python -m tests.reliability.disk`. The server must serve, and end, as if there were.

A full disk (/dev/full), a file that may not grow (a limit of its size), a pipe that nobody reads any more.
"""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tests.reliability.crowd import Crowd, Tally
from tests.reliability.server import Server, write_model

KINDS = ("full", "limited", "unread")
MOST_BYTES = 4 << 20  # of a file under a limit; the front ends' own files are smaller


@contextlib.contextmanager
def place(kind: str) -> Iterator[IO[Any]]:
    """Where nothing can be written."""
    if kind == "full":
        with Path("/dev/full").open("wb") as file:
            yield file
    elif kind == "limited":
        with tempfile.TemporaryFile("ab") as file:
            file.truncate(MOST_BYTES)
            yield file
    else:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as file:
            yield file


def serve_without_logs(model: Path, kind: str, *options: str) -> Tally:
    """A whole life of a server that cannot log; what its clients saw."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if kind == "limited":  # the server inherits it
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_BYTES, before[1]))
    try:
        with place(kind) as file:
            server = Server(model, "--log-level", "debug", *options, log=file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    try:
        server.wait_ready()
        with Crowd(server.port, 4) as crowd:
            crowd.wait_for(30)
        crowd.tally.assert_each_ended_once()
        assert set(crowd.tally.kinds) == {"finished"}, crowd.tally.kinds
        server.assert_idle()
        code = server.stop()
        assert code == 0, f"exit code {code}"
        server.assert_nothing_left()
    finally:
        server.close()
    return crowd.tally


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny")
        for kind in KINDS:
            for form in ("text", "json"):
                tally = serve_without_logs(model, kind, "--log-format", form)
                print(f"{kind}, {form}: {dict(tally.kinds)}, exit 0", flush=True)


if __name__ == "__main__":
    main()
