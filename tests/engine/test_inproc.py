"""InprocClient: streams from a core on its own thread, aborts, and failure."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tabstop.engine.inproc import InprocClient
from tabstop.errors import EngineDeadError, InputError
from tabstop.types import FinishReason, Limits, Sampling, Submit, pack_ids
from tests.engine.simulated import expected_output, make_core

GREEDY = Sampling(temperature=0)


@pytest.fixture
def client():
    client = InprocClient(make_core(num_blocks=256))
    yield client
    client.close()


def submit(client: InprocClient, prompt: list[int], max_tokens: int, num_samples: int = 1) -> Submit:
    limits = Limits(max_tokens, stop_sets=())
    return Submit(client.new_request_id(), pack_ids(prompt), GREEDY, limits, num_samples=num_samples)


async def collect(client: InprocClient, request: Submit) -> list[int]:
    return [token async for delta in client.submit(request) for token in delta.token_ids]


async def test_many_streams_at_once(client):
    prompts = [[n, n + 1, n + 2] for n in range(40)]
    outputs = await asyncio.gather(*(collect(client, submit(client, prompt, 9)) for prompt in prompts))
    assert outputs == [expected_output(prompt, 9, GREEDY) for prompt in prompts]


async def test_leaving_a_stream_aborts_its_request(client, monkeypatch):
    launch = client.core.workers.launch
    monkeypatch.setattr(client.core.workers, "launch", lambda plan: time.sleep(0.005) or launch(plan))
    stream = client.submit(submit(client, [1, 2], 100, num_samples=3))
    await anext(stream)
    await stream.aclose()
    await collect(client, submit(client, [3], 2))
    while client.core.num_requests:
        await asyncio.sleep(0.001)
    assert client.core.stats().finished[FinishReason.ABORT] == 3 and client.stats.ledger.used == 0
    assert client._streams == {}


async def test_commands_run_on_the_engines_thread_and_wake_it(client):
    assert await client.command("warm", {"token_ids": [1, 2, 3]}) == 3
    while client.core.num_requests:
        await asyncio.sleep(0.001)
    assert client.core.workers.num_computed_tokens == 3
    with pytest.raises(InputError):
        await client.command("no such command")


async def test_every_verb_of_a_closed_engine_says_so():
    client = InprocClient(make_core())
    client.close()
    with pytest.raises(EngineDeadError):
        await client.command("stats")
    with pytest.raises(EngineDeadError):
        client.abort((0, 0))
    with pytest.raises(EngineDeadError):
        _ = client.info


async def test_a_closed_engine_ends_open_streams_and_refuses_new_ones():
    client = InprocClient(make_core())
    stream = client.submit(submit(client, [1], 100))
    client.close()
    deltas = [delta async for delta in stream]
    assert deltas[-1].finish is FinishReason.ERROR and deltas[-1].failure.code == "engine_dead"
    with pytest.raises(EngineDeadError):
        client.submit(submit(client, [1], 4))


async def test_a_failing_step_reaches_commands_that_wait():
    core, may_fail = make_core(), threading.Event()

    def explode(plan):
        may_fail.wait()
        raise RuntimeError("device lost")

    core.workers.launch = explode
    client = InprocClient(core)
    stream = client.submit(submit(client, [1], 4))
    while not core.num_requests:
        await asyncio.sleep(0.001)  # until the engine's thread has begun its step
    waiting = asyncio.create_task(client.command("stats"))
    await asyncio.sleep(0)
    may_fail.set()
    with pytest.raises(EngineDeadError):
        await waiting
    assert [delta.finish async for delta in stream] == [FinishReason.ERROR]


async def test_a_failing_step_reaches_every_reader():
    core = make_core()

    def explode(plan):
        raise RuntimeError("device lost")

    core.workers.launch = explode
    client = InprocClient(core)
    deltas = [delta async for delta in client.submit(submit(client, [1], 4))]
    assert [delta.finish for delta in deltas] == [FinishReason.ERROR]
    with pytest.raises(EngineDeadError):
        await collect(client, submit(client, [1], 4))
