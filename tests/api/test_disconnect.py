"""Clients that leave, at any point and in any manner: nothing of theirs may remain."""

from __future__ import annotations

import gc
import json
import random
import socket
import weakref
from collections.abc import Iterator

import httpx
import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.engine.fake import FakeEngine
from tests.api.serving import Running, serving
from tests.reliability.client import Patience
from tests.reliability.requests import Ask
from tests.reliability.storms import blow


def request_bytes(path: str = "/v1/completions", **body: object) -> bytes:
    content = json.dumps({"prompt": "x" * 20, "max_tokens": 4000} | body).encode()
    return b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%s" % (
        path.encode(),
        len(content),
        content,
    )


@pytest.fixture
def slow(checkpoint: Checkpoint) -> Iterator[Running]:
    """No token for minutes: every request stays in its first phase."""
    engine = FakeEngine(stop_sets={"eos": frozenset()})
    with serving(checkpoint, engine) as running:
        engine.delay = 300  # the warm-up is over
        yield running


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_token(slow: Running, stream: bool) -> None:
    with socket.create_connection(("127.0.0.1", slow.port)) as connection:
        connection.sendall(request_bytes(stream=stream, n=3))
        slow.wait_until(lambda: slow.service.num_text_states == 3)
        assert slow.engine.num_live == 1
    slow.assert_idle()
    assert slow.engine.num_aborted["waiting"] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_in_the_middle(endless: Running, stream: bool) -> None:
    before = endless.engine.num_aborted["decoding"]
    with socket.create_connection(("127.0.0.1", endless.port)) as connection:
        connection.sendall(
            request_bytes("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], stream=stream)
        )
        endless.wait_until(lambda: endless.service.num_text_states == 1)
        generated = endless.engine.num_generated
        endless.wait_until(lambda: endless.engine.num_generated > generated + 3)
    endless.assert_idle()
    assert endless.engine.num_aborted["decoding"] == before + 1


def test_a_reset_is_a_disconnect(endless: Running) -> None:
    connection = socket.create_connection(("127.0.0.1", endless.port))
    connection.sendall(request_bytes(stream=True))
    assert connection.recv(100)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()
    endless.assert_idle()


def test_leaving_inside_the_body(endless: Running) -> None:
    submitted = endless.engine.num_submitted
    with socket.create_connection(("127.0.0.1", endless.port)) as connection:
        connection.sendall(request_bytes(stream=True)[:-30])
    assert httpx.get(endless.url + "/readyz").status_code == 200
    endless.assert_idle()
    assert endless.engine.num_submitted == submitted


def test_a_client_that_never_reads_is_dropped_when_it_leaves(checkpoint: Checkpoint) -> None:
    with serving(checkpoint, FakeEngine(stop_sets={"eos": frozenset()})) as running:
        connection = socket.create_connection(("127.0.0.1", running.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request_bytes(stream=True, n=32))
        running.wait_until(lambda: running.engine.num_generated > 1000)
        connection.close()
        running.assert_idle()


def test_a_left_answer_is_freed_at_once(endless: Running) -> None:
    """Front ends collect garbage rarely: what is in a cycle stays, and a storm would fill the memory with it."""
    gc.collect()
    gc.disable()
    try:
        with socket.create_connection(("127.0.0.1", endless.port)) as connection:
            connection.sendall(request_bytes(stream=True))
            assert connection.recv(100)
            left = endless.call(lambda: [weakref.ref(answer) for answer in endless.service.answers])
        endless.assert_idle()
        assert len(left) == 1
        endless.wait_until(lambda: left[0]() is None)
    finally:
        gc.enable()


def leaving(generator: random.Random) -> tuple[Ask, Patience]:
    """A request whose client goes after some reads or at a random time, if it is not answered by then."""
    body = {
        "prompt": "x" * generator.randrange(1, 50),
        "max_tokens": generator.choice([1, 5, 1000]),
        "n": generator.randrange(1, 4),
        "stream": generator.random() < 0.8,
        "stop": ["\n\n", "never"],
    }
    ask = Ask("/v1/completions", body, num_choices=body["n"])
    is_reset = generator.random() < 0.3
    if generator.random() < 0.5:
        return ask, Patience(generator.randrange(1, 10), is_reset)
    return ask, Patience(None, is_reset, seconds=generator.uniform(0.01, 1.0))


async def test_two_hundred_streams_cancelled_at_random_points(endless: Running) -> None:
    """However slow the machine is: each ends once, and what a client left is not computed to its end."""
    before = endless.engine.num_aborted.total()
    tally = await blow(endless.port, 200, leaving, seed=0)
    endless.assert_idle()
    tally.assert_each_ended_once()
    assert set(tally.kinds) <= {"left", "finished"} and len(tally.ends) == 200, tally.kinds
    assert endless.engine.num_aborted.total() - before > 20
    assert httpx.get(endless.url + "/readyz").status_code == 200
