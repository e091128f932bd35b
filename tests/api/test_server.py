"""Start, death and drain of a front end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from tabstop.api.server import run_front_end
from tabstop.api.state import ServerState
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tabstop.service import make_service
from tests.api.serving import Running, serving


@pytest.fixture
def running(checkpoint: Checkpoint) -> Iterator[Running]:
    """Endless streams; drains within two seconds."""
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.002)
    with serving(checkpoint, engine, ServerConfig(drain_timeout=2.0)) as server:
        yield server


def stream(server: Running, **body: object) -> Iterator[dict[str, object] | str]:
    """The events of a stream."""
    request = {"prompt": "x", "max_tokens": 4000, "stream": True} | body
    with httpx.stream("POST", server.url + "/v1/completions", json=request, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                content = line.removeprefix("data: ")
                yield content if content == "[DONE]" else json.loads(content)


async def test_not_ready_before_a_real_token(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.3)
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    stop = asyncio.Event()
    config = ServerConfig()
    serving = asyncio.create_task(run_front_end(make_service(checkpoint, [engine], config), config, listening, stop))
    async with httpx.AsyncClient() as client:
        response = await client.get(url + "/readyz")
        assert response.status_code == 503 and response.headers["retry-after"]
        assert "no token" in response.json()["error"]["message"]
        assert (await client.get(url + "/livez")).status_code == 200
        async with asyncio.timeout(10):
            while (await client.get(url + "/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
        assert engine.num_generated == 1
    stop.set()
    await serving
    assert listening.fileno() == -1


async def test_readiness_is_told_once_and_after_failed_tries(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, max_num_requests=0)
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    stop, told, config = asyncio.Event(), asyncio.Queue[int](), ServerConfig()
    service = make_service(checkpoint, [engine], config)
    state = ServerState(is_ready=False, on_ready=lambda: told.put_nowait(engine.num_generated))
    serving = asyncio.create_task(run_front_end(service, config, listening, stop, state))
    async with httpx.AsyncClient() as client, asyncio.timeout(20):
        while "starting: no token" in (reason := (await client.get(url + "/readyz")).json()["error"]["message"]):
            await asyncio.sleep(0.01)
        assert reason.startswith("starting: ") and told.empty()
        engine.max_num_requests = 1
        assert await told.get() == 1
        assert (await client.get(url + "/readyz")).status_code == 200
    stop.set()
    await serving
    assert told.empty() and engine.num_generated == 1


def test_engine_death(running: Running) -> None:
    events = stream(running)
    next(events)
    running.call(running.engine.die)
    *_, error, done = events
    assert error["error"]["code"] == "engine_dead" and done == "[DONE]"
    response = httpx.get(running.url + "/readyz")
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"
    assert httpx.get(running.url + "/livez").status_code == 200
    later = httpx.post(running.url + "/v1/completions", json={"prompt": "x"})
    assert later.status_code == 503 and later.json()["error"]["code"] == "engine_dead"
    assert "tabstop_engine_up{" in httpx.get(running.url + "/metrics").text
    running.assert_idle()


def test_a_full_queue_is_429(running: Running) -> None:
    running.engine.max_num_requests = 0
    response = httpx.post(running.url + "/v1/completions", json={"prompt": "x"})
    assert response.status_code == 429 and response.headers["retry-after"]
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_drain_lets_open_streams_end(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.01)
    with serving(checkpoint, engine) as running, httpx.Client(base_url=running.url) as client:
        client.get("/livez")  # a connection that is open before the drain
        events = stream(running, max_tokens=60)
        next(events)
        running.loop.call_soon_threadsafe(running.stop.set)
        running.wait_until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert "shutting down" in refused.json()["error"]["message"]
        *_, last, done = events
        assert last["choices"][0]["finish_reason"] == "length" and done == "[DONE]"


def test_what_does_not_end_gets_an_error_event(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.01)
    with serving(checkpoint, engine, ServerConfig(drain_timeout=0.1)) as running:
        events = stream(running)
        next(events)
        running.loop.call_soon_threadsafe(running.stop.set)
        *_, error, done = events
        assert error["error"]["code"] == "unavailable" and done == "[DONE]"
    assert engine.num_live == 0


def test_cancelling_stops_at_once(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.01)
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = ServerConfig(drain_timeout=300)

    async def run() -> None:
        service = make_service(checkpoint, [engine], config)
        task = asyncio.create_task(run_front_end(service, config, listening, asyncio.Event()))
        await asyncio.to_thread(started.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    body = {"prompt": "x", "max_tokens": 4000, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        started.set()
        assert "unavailable" in "".join(lines)
    thread.join(30)
    assert not thread.is_alive() and engine.num_live == 0
