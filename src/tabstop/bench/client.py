"""One request over HTTP, with both clocks: when it should have gone out and when it did.

Knows one endpoint and one event loop. Arrival times are taken right after the bytes leave the socket's reader, before
any parsing. Schedules are load.py's, counting is tokens.py's.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable

import aiohttp
import msgspec

from tabstop.bench.dialects import (
    UNREADABLE,
    Dialect,
    Event,
    Sampling,
    decode_event,
    decode_whole,
    error_text,
    make_dialect,
)
from tabstop.bench.records import Chunk, Message, Record, Turn
from tabstop.bench.sse import EventParser
from tabstop.errors import InputError

READ_BUFFER = 1 << 20  # bytes; aiohttp's 64 KB pauses reading under bursts
MAX_BODY, MAX_TOKEN_BYTES = 16 << 20, 16 << 10  # an answer's size: so much, and so much more for each token asked for
MAX_TOKEN_RATIO, FREE_TOKENS = 16, 64  # more tokens or chunks than this × max_tokens + that: a server without a limit
MAX_COUNT = 1 << 31  # tokens; nobody's prompt is longer
Clock = Callable[[], float]


class Endpoint(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where requests go and how they look."""

    url: str  # without the dialect's path
    dialect: str = "openai-completions"
    sampling: Sampling = Sampling()
    headers: dict[str, str] = {}
    timeout: float = 600.0  # whole request. unit: seconds
    label: str = ""


def open_session(endpoint: Endpoint) -> aiohttp.ClientSession:
    """A connection pool without a limit: the client must never queue what the load wants to send."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=endpoint.headers,
        read_bufsize=READ_BUFFER,
        auto_decompress=True,
    )


class Prepared(msgspec.Struct, frozen=True):
    """A request ready to send: nothing is encoded on the clock."""

    url: str
    body: bytes
    turn: Turn


def prepare(endpoint: Endpoint, dialect: Dialect, turn: Turn) -> Prepared:
    body = msgspec.json.encode(dialect.body(turn, endpoint.sampling))
    return Prepared(endpoint.url.rstrip("/") + dialect.path_of(turn, endpoint.sampling), body, turn)


def request_id(record: Record) -> str:
    """Session and turn as a UUID: llama-cpp-python's server answers 400 to any other form."""
    return str(uuid.UUID(int=(record.session << 16) + record.turn, version=4))


def with_answer(turn: Turn, before: Turn, answer: str) -> Turn:
    """The turn after everything that was said before: the previous prompt, the server's own answer, the new message."""
    if turn.messages:
        messages = [*before.messages, Message("assistant", answer), turn.messages[-1]]
        return msgspec.structs.replace(turn, messages=messages)
    return msgspec.structs.replace(turn, text=before.text + answer + turn.text)


class Client:
    """Sends turns to one endpoint and writes down what happens. `now` gives seconds since the start of the run."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession, now: Clock) -> None:
        self.endpoint = endpoint
        self.dialect = make_dialect(endpoint.dialect)
        self.session = session
        self.now = now
        self.num_bytes = 0

    async def perform(self, prepared: Prepared, record: Record) -> Record:
        """Fills `record`, whose identity and intended time are set. Never raises but CancelledError (superseded)."""
        turn = prepared.turn
        limit = min(self.endpoint.timeout, turn.cancel_after or float("inf"))
        record.sent = self.now()
        try:
            async with asyncio.timeout(limit):
                await self._ask(prepared, record)
        except TimeoutError:
            was_meant = turn.cancel_after is not None and turn.cancel_after <= self.endpoint.timeout
            record.outcome = "cancelled" if was_meant else "timeout"
            record.error = "" if was_meant else f"no end after {self.endpoint.timeout:g} s"
        except InputError as error:
            record.outcome, record.error = "error", error.message
        except aiohttp.ClientPayloadError as error:
            record.outcome, record.error = "error", f"connection lost inside the answer ({type(error).__name__})"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.outcome, record.error = "error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        except asyncio.CancelledError:
            record.outcome = "superseded"
            raise
        except Exception as error:  # whatever a server can provoke: an answer that broke the client was never "ok"
            record.outcome, record.error = "error", f"the answer cannot be read ({type(error).__name__})"
        finally:
            record.ended = self.now()
            record.digest = hashlib.sha256(record.text.encode("utf-8", "replace")).hexdigest()[:16]
        return record

    async def _ask(self, prepared: Prepared, record: Record) -> None:
        headers = {"content-type": "application/json", "x-request-id": request_id(record)}
        post = self.session.post(prepared.url, data=prepared.body, headers=headers, allow_redirects=False)
        async with post as response:
            if response.status != 200:
                raise InputError(await _refusal(response))
            collector = Collector(self.dialect, record)
            if not self.endpoint.sampling.stream:
                body = await read_body(response, MAX_BODY + MAX_TOKEN_BYTES * record.max_tokens)
                arrived = self.now()
                self.num_bytes += len(body)
                collector.take_whole(body, arrived)
                return
            try:
                await self._read_stream(response, collector)
            finally:
                record.text = "".join(collector.texts)

    async def _read_stream(self, response: aiohttp.ClientResponse, collector: Collector) -> None:
        left = MAX_BODY + MAX_TOKEN_BYTES * collector.record.max_tokens
        while received := await response.content.readany():
            arrived = self.now()
            self.num_bytes += len(received)
            left -= len(received)
            if left < 0:
                raise InputError(f"an answer of more than {MAX_BODY >> 20} MB: its end was not waited for")
            collector.feed(received, arrived)
        if response.content_type != "text/event-stream" and not collector.is_ended:
            raise InputError(f"not a stream: the server answered with {response.content_type} (--no-stream reads JSON)")
        collector.finish()


class Collector:
    """Bytes with their arrival times → the record's chunks, text and usage."""

    def __init__(self, dialect: Dialect, record: Record) -> None:
        self.dialect = dialect
        self.record = record
        self.parser = EventParser()
        self.is_ended = False
        self.texts: list[str] = []
        self.num_known = 0  # completion tokens so far, by the server's running count

    def feed(self, received: bytes, arrived: float) -> None:
        """Raises InputError for broken events and for errors that the server reports inside the stream."""
        for data in self.parser.feed(received):
            event = decode_event(self.dialect, data)
            if event.error:
                raise InputError(f"error inside the stream: {event.error}")
            self._take(event, arrived)

    def take_whole(self, body: bytes, arrived: float) -> None:
        """An answer in one body: all its tokens arrive with its end. Raises InputError like feed()."""
        event = decode_whole(self.dialect, body)
        if event.error:
            raise InputError(event.error)
        if event.num_tokens is None:
            event = msgspec.structs.replace(event, num_tokens=event.completion_tokens)
        self._take(event, arrived)
        self.record.text = event.text
        if self.record.finish_reason is None:
            raise InputError(f"the answer is no whole {self.dialect.name} answer: it has no finish reason")

    def _take(self, event: Event, arrived: float) -> None:
        record = self.record
        self.is_ended = self.is_ended or event.is_end
        if event.finish_reason is not None:
            record.finish_reason = event.finish_reason
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            if (value := getattr(event, name)) is not None:
                self._check_count(name, value)
                setattr(record, name, value)
        num_tokens = -1
        if event.num_tokens is not None:
            num_tokens = event.num_tokens
        elif event.total_tokens is not None:
            num_tokens = event.total_tokens - self.num_known
        self._check_count("completion_tokens", max(len(record.chunks), self.num_known + num_tokens, 0))
        if event.text or num_tokens > 0:
            self.num_known += max(0, num_tokens)
            self.texts.append(event.text)
            record.chunks.append(Chunk(arrived, num_tokens, len(event.text)))

    def _check_count(self, name: str, value: int) -> None:
        """Raises InputError for a number of tokens that nobody can have made."""
        wanted = self.record.max_tokens
        if name == "completion_tokens" and wanted and value > MAX_TOKEN_RATIO * wanted + FREE_TOKENS:
            raise InputError(f"the server ignores max_tokens: {wanted} were asked for, {value} came")
        if not 0 <= value <= MAX_COUNT:
            raise InputError(f"the server reports {value} {name}")

    def finish(self) -> None:
        """Raises InputError if the stream stopped without saying that it was over."""
        if self.parser.has_tail:
            raise InputError("broken SSE: the stream stopped inside an event")
        if not self.is_ended and self.record.finish_reason is None:
            raise InputError("broken SSE: the stream stopped without a finish reason or [DONE]")


async def read_body(response: aiohttp.ClientResponse, limit: int = MAX_BODY) -> bytes:
    """The whole body. Raises InputError for one that is longer than `limit`, which may have no end."""
    parts, size = [], 0
    while part := await response.content.readany():
        parts.append(part)
        size += len(part)
        if size > limit:
            raise InputError(f"HTTP {response.status} with a body of more than {limit >> 20} MB")
    return b"".join(parts)


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """What to say of an answer that is none. A redirect is not followed: its detour would be measured."""
    if target := response.headers.get("location"):
        return f"HTTP {response.status}: it sends its clients to {target}: measure that address"
    return f"HTTP {response.status}: {_error_body(await read_body(response))}"


def _error_body(body: bytes) -> str:
    try:
        decoded = msgspec.json.decode(body)
    except UNREADABLE:
        return error_text(body[:300].decode("utf-8", "replace")) or "without a word of explanation"
    return error_text(decoded.get("error", decoded) if isinstance(decoded, dict) else decoded)


def monotonic_since(start: float) -> Clock:
    """Seconds since `start` (a time.monotonic value, which all processes of a machine share)."""
    return lambda: time.monotonic() - start
