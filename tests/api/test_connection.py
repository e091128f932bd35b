"""Clients that take their time, or send more head than there is room for: over sockets, with limits of a moment."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tests.api.serving import Running, serving

SHORT = 0.4  # seconds: the limits here
PATIENCE = 20.0  # seconds; only a hang reaches it
GET = b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def strict(checkpoint: Checkpoint) -> Iterator[Running]:
    limits = ServerConfig(header_timeout=SHORT, body_timeout=SHORT, send_timeout=SHORT, max_header_bytes=2048)
    with serving(checkpoint, FakeEngine(stop_sets={"eos": frozenset()}), limits) as running:
        yield running


@contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as connection:
        yield connection
    running.assert_idle()


def rest_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = b""
    try:
        while piece := connection.recv(1 << 16):
            data += piece
    except ConnectionResetError:
        pass
    return data


def drip(connection: socket.socket, piece: bytes) -> bytes:
    """Sends a piece again and again, more often than any limit, until the server has had enough."""
    connection.settimeout(SHORT / 8)
    data, end = b"", time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            connection.sendall(piece)
            received = connection.recv(1 << 16)
            if not received:
                return data
            data += received
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return data
    raise AssertionError("the server let it go on")


def code_of(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_headers_that_never_end(strict: Running) -> None:
    with connected(strict) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nhost: localhost\r\n")
        assert code_of(drip(connection, b"x: y\r\n")) == (408, "request_timeout")


def test_a_request_line_that_never_ends(strict: Running) -> None:
    with connected(strict) as connection:
        assert code_of(drip(connection, b"G")) in ((408, "request_timeout"), (400, "invalid_request"))


def test_a_connection_without_a_request(strict: Running) -> None:
    with connected(strict) as connection:
        assert rest_of(connection) == b""


def test_blank_lines_are_no_request(strict: Running) -> None:
    with connected(strict) as connection:
        assert drip(connection, b"\r\n") == b""


def test_a_body_that_never_ends(strict: Running) -> None:
    with connected(strict) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n{")
        assert code_of(drip(connection, b" ")) == (408, "request_timeout")


def test_a_body_that_nobody_waits_for(strict: Running) -> None:
    """A refused request's body may not hold the connection either."""
    with connected(strict) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9999\r\n\r\n{")
        assert drip(connection, b" ").startswith(b"HTTP/1.1 404 ")


def test_an_answer_that_is_not_read(strict: Running) -> None:
    aborts = strict.engine.num_aborted["decoding"]
    with connected(strict) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "n": 32, "stream": True}).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        strict.wait_until(lambda: strict.engine.num_live == 1)
        strict.wait_until(lambda: not strict.engine.num_live and not strict.service.answers)
    assert strict.engine.num_aborted["decoding"] == aborts + 1


@pytest.mark.parametrize(
    "head",
    [
        GET[:-2] + b"x: %s\r\n\r\n" % (b"y" * 3000),
        GET[:-2] + b"x: y\r\n" * 600 + b"\r\n",
        b"GET /%s HTTP/1.1\r\n\r\n" % (b"y" * 3000),
    ],
)
def test_too_much_head(strict: Running, head: bytes) -> None:
    with connected(strict) as connection:
        connection.sendall(head)
        assert code_of(rest_of(connection)) == (431, "header_too_large")


def test_too_much_head_without_an_end(strict: Running) -> None:
    with connected(strict) as connection:
        connection.sendall(GET[:-2] + b"x: ")
        assert code_of(drip(connection, b"y" * 1000)) == (431, "header_too_large")


def test_what_is_not_http(strict: Running) -> None:
    with connected(strict) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert code_of(rest_of(connection)) == (400, "invalid_request")


def test_a_connection_lives_on_after_its_request(strict: Running) -> None:
    """Limits are of a request, not of a connection."""
    with connected(strict) as connection:
        for pieces in ([GET], [GET[:20], GET[20:]], [GET + GET]):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(SHORT / 4)
            data = b""
            while data.count(b"HTTP/1.1 200 OK") < b"".join(pieces).count(b"GET"):
                data += connection.recv(1 << 16)
            time.sleep(SHORT * 1.5)  # longer than a head may take
        connection.sendall(GET[:-2] + b"connection: close\r\n\r\n")
        assert rest_of(connection).startswith(b"HTTP/1.1 200 OK")


def test_a_long_answer_is_not_hurried(checkpoint: Checkpoint) -> None:
    limits = ServerConfig(header_timeout=SHORT, body_timeout=SHORT, send_timeout=SHORT)
    with serving(checkpoint, FakeEngine(stop_sets={"eos": frozenset()}, delay=0.01), limits) as running:
        answer = httpx.post(running.url + "/v1/completions", json={"prompt": "x", "max_tokens": 100})
        assert answer.json()["usage"]["completion_tokens"] == 100


def test_a_refused_body_that_ends_leaves_the_connection_open(strict: Running) -> None:
    with connected(strict) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n12345")
        time.sleep(SHORT / 2)
        connection.sendall(b"67890")
        time.sleep(SHORT * 1.5)
        connection.sendall(GET[:-2] + b"connection: close\r\n\r\n")
        answers = rest_of(connection)
        assert b"HTTP/1.1 404 " in answers and b"HTTP/1.1 200 OK" in answers


def test_a_head_has_so_many_headers(strict: Running) -> None:
    for num_headers, status in ((127, 200), (128, 431), (300, 431)):
        lines = b"".join(b"a%d:\r\n" % index for index in range(num_headers))
        with connected(strict) as connection:
            connection.sendall(
                GET[:-2] + lines + b"connection: close\r\n\r\n" if status != 200 else GET[:-2] + lines + b"\r\n"
            )
            answer = connection.recv(1 << 16)
            assert int(answer.split()[1]) == status, num_headers
            assert (b"--max-num-headers" in answer) == (status == 431)


def test_an_address_has_so_many_connections(checkpoint: Checkpoint) -> None:
    limits = ServerConfig(max_connections_per_address=3)
    with serving(checkpoint, FakeEngine(stop_sets={"eos": frozenset()}), limits) as running:
        held = [socket.create_connection(("127.0.0.1", running.port), PATIENCE) for _ in range(3)]
        for connection in held:
            connection.sendall(GET)
            assert b" 200 OK" in connection.recv(1 << 16)
        with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as late:
            answer = rest_of(late)
        assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1" in answer and b"3 connections" in answer
        held.pop().close()

        def is_let_in() -> bool:
            with socket.create_connection(("127.0.0.1", running.port), PATIENCE) as connection:
                connection.sendall(GET)
                return b" 200 OK" in connection.recv(1 << 16)

        running.wait_until(is_let_in)
        for connection in held:
            connection.close()
