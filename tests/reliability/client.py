"""One request over one socket of its own, and how it ended: exactly one way, or it counts as lost.

A plain HTTP/1.1 client, because it must leave in the middle, stop reading, and tell a whole answer from a cut one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.reliability.requests import Ask

READ_BYTES = 1 << 16
SILENCE = 120.0  # seconds without a byte; only a hang reaches it


@dataclass(frozen=True, slots=True)
class Patience:
    """When a client leaves: before it reads, after some reads, or never; and whether it says goodbye."""

    num_reads: int | None = None  # None: stays to the end
    is_reset: bool = False  # ends with RST instead of FIN
    seconds: float | None = None  # leaves then, whatever has come


STAYS = Patience()


@dataclass(slots=True)
class End:
    """How a request ended.

    kind: finished (whole, one finish reason a choice) · error (an error event after 200, or an error status) · left
    (the client went) · refused (no connection, nothing was accepted) · lost (cut without a terminal output) · wrong
    (more than one terminal output, or something behind it).
    """

    kind: str
    detail: str = ""
    status: int = 0
    port: int = 0  # of the client's side
    num_bytes: int = 0  # of the answer
    num_events: int = 0
    sent: float = 0.0  # when it began, on time.monotonic()
    first: float | None = None  # when the first byte of an answer came
    ended: float = 0.0


@dataclass(slots=True)
class _Answer:
    """Bytes of one response, and what they amount to."""

    raw: bytearray = field(default_factory=bytearray)

    def split(self) -> tuple[int, dict[str, str], bytes, bool]:
        """Status, headers, body, and whether all of it has come. Status 0: not even the head."""
        head, found, rest = bytes(self.raw).partition(b"\r\n\r\n")
        if not found:
            return 0, {}, b"", False
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        status = int(lines[0].split()[1])
        if headers.get("transfer-encoding") == "chunked":
            body, is_whole = _dechunk(rest)
        else:
            body, is_whole = rest, len(rest) == int(headers.get("content-length", -1))
        return status, headers, body, is_whole


def _dechunk(data: bytes) -> tuple[bytes, bool]:
    """The chunks' content, and whether the last one was there and nothing behind it."""
    content = b""
    while True:
        size, found, rest = data.partition(b"\r\n")
        if not found:
            return content, False
        length = int(size, 16)
        if length == 0:
            return content, rest == b"\r\n"
        content += rest[:length]
        if len(rest) < length + 2:
            return content, False
        data = rest[length + 2 :]


async def send(port: int, ask: Ask, patience: Patience = STAYS) -> End:
    """Asks and stays as long as patience says. Never raises for what a server can do."""
    end = End("lost", sent=asyncio.get_running_loop().time())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        end.kind, end.detail = "refused", str(error)
        return end
    answer = _Answer()
    try:
        end.port = writer.get_extra_info("sockname")[1]
        async with asyncio.timeout(patience.seconds):
            writer.write(ask.to_bytes())
            await _read(reader, answer, patience, end)
    except TimeoutError:
        end.kind, end.detail = "left", "on time"
    except OSError as error:
        end.detail = type(error).__name__
    finally:
        _leave(writer, patience)
        end.ended = asyncio.get_running_loop().time()
    if end.kind != "left":
        judge(ask, answer, end)
    return end


async def _read(reader: asyncio.StreamReader, answer: _Answer, patience: Patience, end: End) -> None:
    num_reads = 0
    while patience.num_reads is None or num_reads < patience.num_reads:
        async with asyncio.timeout(SILENCE):
            data = await reader.read(READ_BYTES)
        if not data:
            return
        if end.first is None:
            end.first = asyncio.get_running_loop().time()
        answer.raw += data
        num_reads += 1
    end.kind, end.detail = "left", "in the middle"


def _leave(writer: asyncio.StreamWriter, patience: Patience) -> None:
    if patience.is_reset:
        with contextlib.suppress(OSError):
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        writer.transport.abort()
    else:
        writer.close()


def judge(ask: Ask, answer: _Answer, end: End) -> None:
    """Fills in what the bytes amount to."""
    status, _, body, is_whole = answer.split()
    end.status, end.num_bytes = status, len(answer.raw)
    if not is_whole:
        end.kind, end.detail = (
            "lost",
            f"{end.detail} after {len(answer.raw)} bytes, status {status}: {body[-80:]!r}",
        )
    elif status >= 400:
        end.kind, end.detail = "error", _code(body)
    elif ask.is_stream:
        end.kind, end.detail, end.num_events = judge_events(body, ask.num_choices)
    else:
        end.kind, end.detail = judge_whole(body, ask.num_choices)


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return f"no error object: {body[:80]!r}"


def judge_whole(body: bytes, num_choices: int) -> tuple[str, str]:
    """An answer that came as one JSON object must have a finish reason for each choice."""
    content = json.loads(body)
    reasons = [choice["finish_reason"] for choice in content.get("choices", [content | {"finish_reason": "stop"}])]
    is_right = len(reasons) == num_choices and all(reasons)
    return ("finished", "") if is_right else ("wrong", f"finish reasons {reasons}")


def judge_events(body: bytes, num_choices: int) -> tuple[str, str, int]:
    """Kind, detail and number of events of a whole stream: one end a choice, or one error, and nothing behind it."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line.startswith("data: ")]
    events: list[Any] = [line if line == "[DONE]" else json.loads(line) for line in lines]
    ends: Counter[str] = Counter()
    errors = []
    for event in events:
        if event == "[DONE]":
            continue
        if "error" in event:
            errors.append(str(event["error"]["code"]))
        elif "choices" in event:
            ends.update(str(choice["index"]) for choice in event["choices"] if choice["finish_reason"])
        elif event["stop"]:
            ends[str(event["index"])] += 1
    is_openai = "[DONE]" in events
    if events.count("[DONE]") > 1 or (is_openai and events[-1] != "[DONE]"):
        return "wrong", "something behind [DONE]", len(events)
    if len(errors) == 1 and "error" in events[-2 if is_openai else -1]:
        return "error", errors[0], len(events)
    if not errors and len(ends) == num_choices and set(ends.values()) == {1}:
        return "finished", "", len(events)
    return "wrong", f"errors {errors}, ends {dict(ends)}, {len(events)} events", len(events)
