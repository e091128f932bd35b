"""Servers that no client should trust: each answer is one clear error, never "ok", and never without an end."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from tabstop.bench.client import MAX_BODY, Client, Endpoint, monotonic_since, open_session, prepare
from tabstop.bench.dialects import Sampling
from tabstop.bench.probe import probe
from tabstop.bench.records import Record, Turn
from tabstop.bench.report import Endpoints
from tabstop.errors import InputError

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
LAST = {"choices": [{"text": " a", "finish_reason": "length"}]}
DONE = b"data: [DONE]\n\n"


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def usage(**counts: int) -> list[bytes]:
    return [STREAM, event(LAST), event({"choices": [], "usage": counts}), DONE]


def status(line: str, headers: str = "", body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {line}\r\n{headers}connection: close\r\n\r\n".encode() + body


@asynccontextmanager
async def serving(answer: list[bytes], last: bytes = b"", get: bytes = status("404 N")) -> AsyncIterator[str]:
    """A server that sends every POST the parts, then `last` until the client hangs up."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            parts = (
                [get] if head.startswith(b"GET") else itertools.chain(answer, itertools.repeat(last) if last else ())
            )
            for part in parts:
                writer.write(part)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def ask(answer: list[bytes], last: bytes = b"", *, stream: bool = True) -> Record:
    async def run() -> Record:
        async with serving(answer, last) as url:
            endpoint = Endpoint(url=url, sampling=Sampling(stream=stream), timeout=60)
            async with open_session(endpoint) as session:
                client = Client(endpoint, session, monotonic_since(0.0))
                record = Record(session=1, intended=0.0, sent=0.0, ended=0.0, max_tokens=3)
                return await client.perform(prepare(endpoint, client.dialect, Turn(text="a", max_tokens=3)), record)

    return asyncio.run(run())


def faults() -> Iterator[tuple[str, list[bytes], bytes, str]]:
    deep = b'{"error":' + b"[" * 100_000
    yield "deep", [STREAM, b"data: " + deep + b"\n\n"], b"", "recursion"
    yield "negative usage", usage(completion_tokens=-5), b"", "-5 completion_tokens"
    yield "negative prompt", usage(prompt_tokens=-7), b"", "-7 prompt_tokens"
    yield "huge usage", usage(completion_tokens=10**12), b"", "ignores max_tokens"
    yield "tokens without end", [STREAM], event({"choices": [{"text": " a"}]}), "ignores max_tokens"
    yield "a line without end", [STREAM, b"data: "], b"x" * 2**20, f"more than {MAX_BODY >> 20} MB"
    yield "an error without end", [status("500 Oops")], b"x" * 2**20, f"more than {MAX_BODY >> 20} MB"
    yield (
        "redirect",
        [status("307 T", "location: http://other/x\r\n")],
        b"",
        "HTTP 307: it sends its clients to http://o",
    )
    yield "a page", [status("200 OK", "content-type: text/html\r\n", b"<html>\n\n")], b"", "answered with text/html"
    yield "not UTF-8", [STREAM, b'data: {"choices":[{"text":"\xff"}]}\n\n'], b"", "broken SSE"


@pytest.mark.parametrize(("answer", "last", "message"), [pytest.param(*f[1:], id=f[0]) for f in faults()])
def test_no_answer_breaks_the_client(answer: list[bytes], last: bytes, message: str) -> None:
    record = ask(answer, last)
    assert record.outcome == "error" and message in record.error, record.error


def test_a_whole_answer_without_end_is_given_up() -> None:
    record = ask([status("200 OK")], b"x" * 2**20, stream=False)
    assert record.outcome == "error" and "MB" in record.error


def test_a_probe_survives_what_a_server_says_of_itself() -> None:
    """Bytes that are no UTF-8 in a header would only be found when the report is written, after the measurement."""
    deep = status("200 OK", "server: \\xff\r\ncontent-type: application/json\r\n", b"[" * 200_000)

    async def run() -> str:
        good = [STREAM, event(LAST), DONE]
        async with serving(good, get=deep.replace(b"\\xff", b"\xff")) as url:
            _, facts = await asyncio.to_thread(probe, Endpoint(url=url, dialect="auto"))
            assert facts.identity == {}
            return msgspec.json.encode(Endpoints(url=url, dialect="", model="", facts=facts)).decode()

    assert "server_header" in asyncio.run(run())


def test_a_missing_key_is_named() -> None:
    async def run() -> None:
        async with serving([status("401 No", body=b"no way")]) as url:
            await asyncio.to_thread(probe, Endpoint(url=url, dialect="auto"))

    with pytest.raises(InputError, match="no way; set TABSTOP_BENCH_API_KEY"):
        asyncio.run(run())
