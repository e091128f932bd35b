"""What a request may ask for, and what happens when everybody asks at once: refusals are early, and nothing is lost."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from msgspec import structs

from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tabstop.engine.inproc import InprocClient
from tests.api.serving import Running, serving
from tests.engine.simulated import make_core

NUM_SLOTS, NUM_WAITING = 4, 8
STEP_SECONDS = 0.002


@pytest.fixture(scope="module")
def strict(checkpoint: Checkpoint) -> Iterator[Running]:
    config = ServerConfig(
        max_prompt_tokens=50, max_request_tokens=400, max_logit_biases=3, max_queue_age=7.5, max_num_samples=8
    )
    with serving(checkpoint, FakeEngine(stop_sets={"eos": frozenset()}), config) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x" * 50}, None),
        ({"prompt": "x" * 51}, "prompt"),
        ({"prompt": ["x", "x" * 51]}, "prompt"),
        ({"prompt": "x" * 51, "truncate_prompt_tokens": 50}, None),
        ({"prompt": "x" * 48, "max_tokens": 44, "n": 8}, None),
        ({"prompt": "x" * 48, "max_tokens": 45, "n": 8}, "max_tokens"),
        ({"prompt": ["x" * 48] * 4, "max_tokens": 52}, None),
        ({"prompt": ["x" * 48] * 4, "max_tokens": 53}, "max_tokens"),
        ({"prompt": ["x" * 50] * 9, "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 4000}, "max_tokens"),
        ({"prompt": "x", "logit_bias": {"1": 1, "2": 1, "3": False}}, None),
        ({"prompt": "x", "logit_bias": {"1": 1, "2": 1, "3": False, "4": 2}}, "logit_bias"),
    ],
)
def test_what_one_request_may_take(strict: Running, body: dict[str, Any], param: str | None) -> None:
    num_submitted = strict.engine.num_submitted
    response = httpx.post(strict.url + "/v1/completions", json={"max_tokens": 1} | body)
    if param is None:
        assert response.status_code == 200, response.text
    else:
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
        assert strict.engine.num_submitted == num_submitted
    strict.assert_idle()


def test_where_max_tokens_is_not_given_it_is_what_the_request_may_take(strict: Running) -> None:
    messages = [{"role": "user", "content": "x"}]
    answer = httpx.post(strict.url + "/v1/chat/completions", json={"messages": messages, "n": 4}).json()
    usage = answer["usage"]
    assert usage["completion_tokens"] == 4 * ((400 - usage["prompt_tokens"]) // 4)
    assert strict.engine.submitted[-1].limits.queue_ms == 7500


@pytest.mark.parametrize(("waiting", "unreported", "status"), [(1023, 0, 200), (1024, 0, 429), (1000, 24, 429)])
def test_a_full_queue_refuses_before_it_reads(
    checkpoint: Checkpoint, waiting: int, unreported: int, status: int
) -> None:
    """No body has come, and none is needed to refuse; nor is the engine asked."""
    engine = FakeEngine(stop_sets={"eos": frozenset()})
    with serving(checkpoint, engine) as running:
        engine.num_waiting, engine.num_unreported = waiting + engine.engine_info.max_num_seqs, unreported
        num_submitted = engine.num_submitted
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 14\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
            connection.sendall(head)
            if status == 200:
                connection.sendall(b'{"prompt":"x"}')
            answer = connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert (b"retry-after: 1" in answer) == (status == 429)
        assert engine.num_submitted == num_submitted + (status == 200)
        assert httpx.get(running.url + "/v1/models").status_code == 200
        assert httpx.post(running.url + "/tokenize", json={"prompt": "x"}).status_code == 200
        engine.num_waiting = engine.num_unreported = 0


@pytest.fixture
def overloaded(checkpoint: Checkpoint) -> Iterator[Running]:
    """A real core with four slots and eight places in its queue; a step takes a moment."""
    core = make_core(num_blocks=256, block_size=4, max_num_seqs=NUM_SLOTS, max_num_waiting=NUM_WAITING)
    core.info = structs.replace(core.info, vocab_size=512)  # the warm-up's token is one of the tokenizer's
    core.stop_sets = {"eos": frozenset()}
    launch = core.workers.launch

    def slow_launch(plan: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return launch(plan)

    core.workers.launch = slow_launch
    engine: Any = InprocClient(core)
    with serving(checkpoint, engine) as running:
        yield running
        core.check()
        assert core.num_requests == 0
    engine.close()


async def test_ten_times_overload_ends_every_request_once(overloaded: Running) -> None:
    """Counts only; benchmarks/overload.py has the times."""
    outcomes: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=None)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": [number % 90 + 1, 2, 3], "max_tokens": 20, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body)
        outcomes[response.status_code] += 1
        if response.status_code == 200:
            assert response.json()["usage"]["completion_tokens"] == 20
        else:
            assert response.json()["error"]["code"] == "overloaded" and int(response.headers["retry-after"]) >= 1

    async with httpx.AsyncClient(base_url=overloaded.url, timeout=60, limits=limits) as client:
        for _ in range(2):
            await asyncio.gather(*(one(client, number) for number in range(10 * (NUM_SLOTS + NUM_WAITING))))
    assert set(outcomes) == {200, 429} and outcomes.total() == 240
    assert outcomes[200] >= 2 * (NUM_SLOTS + NUM_WAITING)  # never fewer than there is room for
    async with httpx.AsyncClient(base_url=overloaded.url) as client:
        await one(client, 1)
    assert outcomes[200] + outcomes[429] == 241 and not overloaded.service.answers
