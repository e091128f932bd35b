"""The engine's socket as both ends see it: where it is, how frames are encoded, which times hold.

Knows msgpack and the message types; knows neither zmq sockets nor who sends what.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from tabstop.types import FromEngine, ToEngine

MAX_FRAME_BYTES = 64 << 20
"""Longest frame either end accepts: sixteen million prompt tokens. The socket drops a peer that sends more."""

HEARTBEAT_SECONDS = 1.0
"""The engine reports at least this often, whatever it does."""

SILENCE_LIMIT_SECONDS = 30.0
"""An engine that says nothing for so long counts as dead where nobody asks for another limit (--engine-timeout)."""

JOIN = "join"
"""The command with which a client makes itself known; the engine answers with EngineInfo once it can serve."""

SUPERVISOR = 0
"""The client number of the supervisor; front ends count from 1 and never reuse a number."""

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def address(folder: str | Path) -> str:
    """The engine's endpoint in a run folder (which only its owner can enter)."""
    return f"ipc://{folder}/engine.sock"


def identity(number: int) -> bytes:
    """A client's number as its routing id."""
    return str(number).encode()


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises msgspec.DecodeError (or its subclass ValidationError) for anything but a well-formed message."""
    message: ToEngine = _decode(_to_engine, frame)
    return message


def decode_from_engine(frame: bytes) -> FromEngine:
    """Raises msgspec.DecodeError."""
    message: FromEngine = _decode(_from_engine, frame)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    try:
        return decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:  # which msgspec lets through
        raise msgspec.DecodeError(f"no text, or nested too deeply: {type(error).__name__}") from None
