"""What the supervisor and its children tell each other over stdin and stdout: one JSON object a line.

Down (stdin): first the child's settings, later events; the end of stdin means that the supervisor is gone or done with
the child. Up (stdout): events. Settings travel here because argv and environment can be read by others: they hold the
API key. Knows no process and no engine.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, BinaryIO, TypeVar

import msgspec

from tabstop.keys import Key

Settings = TypeVar("Settings")

# What children tell:
READY = "ready"
STARTUP_ERROR = "startup_error"
# What children are told:
DRAIN = "drain"  # finish what is open (drain_timeout at most), then exit 0
ENGINE_DEAD = "engine_dead"  # end every open stream with an error, refuse new ones
KEYS = "keys"  # these are valid from now on, and no others

MAX_LINE_BYTES = 32 << 20
"""Thousands of keys fit."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened, with a text for people where there is one."""

    name: str
    message: str = ""
    keys: tuple[Key, ...] = ()  # of KEYS


def to_line(value: Any) -> bytes:
    """A struct or config as one line."""
    return msgspec.json.encode(value) + b"\n"


def to_event(line: bytes) -> Event:
    """Raises msgspec.DecodeError."""
    try:
        return msgspec.json.decode(line, type=Event)
    except (UnicodeDecodeError, RecursionError):  # which msgspec lets through
        raise msgspec.DecodeError("no text, or nested too deeply") from None


def read_settings(kind: type[Settings]) -> Settings:
    """The first line of stdin. Reads no byte more, so that whoever watches stdin afterwards misses nothing."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            break
        line += byte
    return msgspec.json.decode(bytes(line), type=kind)


class Upward:
    """The way up to the supervisor. Takes stdout for itself: what else writes there goes to stderr from now on."""

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(self, name: str, message: str = "") -> None:
        """Sends an event; silently when nobody listens any more."""
        with contextlib.suppress(BrokenPipeError):
            self._file.write(to_line(Event(name, message)))
