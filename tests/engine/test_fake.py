from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from tabstop.engine.fake import FakeEngine, hashed, scripted
from tabstop.errors import EngineDeadError, InputError
from tabstop.types import CachePolicy, Delta, FinishReason, Limits, Sampling, Stage, Submit, pack_ids


def submit(engine: FakeEngine, prompt: list[int] | None = None, **fields: Any) -> Submit:
    limits = fields.pop("limits", Limits(max_tokens=8, stop_sets=()))
    return Submit(
        engine.new_request_id(), pack_ids(prompt or [1, 2]), fields.pop("sampling", Sampling()), limits, **fields
    )


async def collect(engine: FakeEngine, request: Submit) -> dict[int, Delta]:
    """One merged delta a sample; every sample must end exactly once."""
    merged: dict[int, Delta] = {}
    num_ends: Counter[int] = Counter()
    async for delta in engine.submit(request):
        num_ends[delta.sample] += delta.finish is not None
        if delta.sample in merged:
            merged[delta.sample].token_ids += delta.token_ids
            merged[delta.sample].finish = delta.finish
            merged[delta.sample].stop_token_id = delta.stop_token_id
        else:
            merged[delta.sample] = delta
    assert num_ends == dict.fromkeys(range(request.num_samples), 1)
    assert engine.num_live == 0
    return merged


async def test_tokens_depend_on_prompt_seed_and_sample_alone() -> None:
    engine = FakeEngine()
    first = await collect(engine, submit(engine, num_samples=2))
    again = await collect(engine, submit(engine, num_samples=2))
    assert [delta.token_ids for delta in first.values()] == [delta.token_ids for delta in again.values()]
    assert first[0].token_ids != first[1].token_ids
    other = await collect(engine, submit(engine, sampling=Sampling(seed=1)))
    assert other[0].token_ids != first[0].token_ids
    assert first[0].finish is FinishReason.LENGTH and len(first[0].token_ids) == 8


async def test_stop_tokens() -> None:
    engine = FakeEngine(script=scripted([5, 6, 7, 5, 8]), stop_sets={"eos": frozenset([7])})
    by_set = await collect(engine, submit(engine, limits=Limits(max_tokens=9)))
    assert (by_set[0].token_ids, by_set[0].stop_token_id) == ([5, 6, 7], 7)
    by_id = await collect(engine, submit(engine, limits=Limits(max_tokens=9, stop_token_ids=(5,), min_tokens=1)))
    assert by_id[0].token_ids == [5, 6, 7]
    late = await collect(engine, submit(engine, limits=Limits(max_tokens=9, stop_token_ids=(5,), min_tokens=3)))
    assert (late[0].token_ids, late[0].stop_token_id) == ([5, 6, 7, 5], 5)
    ended = await collect(engine, submit(engine, limits=Limits(max_tokens=9, stop_sets=())))
    assert (ended[0].token_ids, ended[0].finish) == ([5, 6, 7, 5, 8], FinishReason.STOP)
    nothing = await collect(engine, submit(engine, limits=Limits(max_tokens=0)))
    assert (nothing[0].token_ids, nothing[0].finish) == ([], FinishReason.LENGTH)


async def test_aborts_end_each_sample_once() -> None:
    engine = FakeEngine(delay=0.001)
    request = submit(engine, num_samples=3, limits=Limits(max_tokens=1000, stop_sets=()))
    stream = engine.submit(request)
    await anext(stream)
    engine.abort(request.request_id, (1,), FinishReason.STOP)
    engine.abort(request.request_id, (1,))
    engine.abort(request.request_id)
    engine.abort(request.request_id)
    ends = [delta async for delta in stream if delta.finish is not None]
    assert {delta.sample: delta.finish for delta in ends} == {
        0: FinishReason.ABORT,
        1: FinishReason.STOP,
        2: FinishReason.ABORT,
    }
    assert engine.num_live == 0 and engine.stats.aborts[Stage.DECODING] == 2


async def test_closing_the_stream_aborts() -> None:
    engine = FakeEngine(delay=300)
    stream = engine.submit(submit(engine))
    await stream.aclose()
    assert engine.num_live == 0 and engine.num_aborted == {Stage.WAITING: 1}


async def test_death() -> None:
    engine = FakeEngine(delay=300)
    stream = engine.submit(submit(engine, num_samples=2))
    engine.die("broken")
    deltas = [delta async for delta in stream]
    assert [delta.failure and delta.failure.code for delta in deltas] == ["engine_dead"] * 2
    for verb in (lambda: engine.info, lambda: engine.stats, lambda: engine.submit(submit(engine))):
        with pytest.raises(EngineDeadError, match="broken"):
            verb()
    with pytest.raises(EngineDeadError):
        await engine.command("drain")


async def test_deadline_and_queue() -> None:
    engine = FakeEngine(delay=0.02)
    late = await collect(engine, submit(engine, limits=Limits(max_tokens=9, stop_sets=(), deadline_ms=1)))
    assert late[0].finish is FinishReason.DEADLINE
    engine.max_num_requests = 0
    refused = await collect(engine, submit(engine))
    assert refused[0].failure is not None and refused[0].failure.code == "overloaded"


async def test_cached_tokens_come_in_blocks_and_scopes() -> None:
    engine = FakeEngine(script=hashed)
    prompt = list(range(40))

    async def cached(ids: list[int], **policy: Any) -> int:
        return (await collect(engine, submit(engine, ids, cache=CachePolicy(**policy))))[0].num_cached_tokens

    assert [await cached(prompt), await cached(prompt)] == [0, 32]
    assert await cached(prompt[:20] + [99] * 20) == 16
    assert await cached(prompt, scope="other") == 0
    assert await cached(prompt, read=False) == 0


async def test_commands() -> None:
    engine = FakeEngine()
    assert await engine.command("warm", {"token_ids": [1]}) is None
    with pytest.raises(InputError):
        await engine.command("explode")
    await asyncio.sleep(0)
