"""The engine process over its socket: a real subprocess with a stub core, driven through ProcessClient."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from tabstop import pipes
from tabstop.children import Child
from tabstop.config import EngineConfig
from tabstop.engine import wire
from tabstop.engine.process import EngineStart
from tabstop.engine.process_client import ProcessClient
from tabstop.errors import EngineDeadError, InputError, NotSupportedError, UnavailableError
from tabstop.types import Delta, FinishReason, Limits, Progress, Sampling, Submit, pack_ids
from tests.engine import stub_core

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0  # seconds; only a hang reaches it


@dataclass
class Running:
    child: Child
    address: str

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.child.wait(), PATIENCE)

    async def told(self) -> list[str]:
        return [event.message async for event in self.child.events()]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}", prepend=":")
    return tmp_path_factory.mktemp("run")


@asynccontextmanager
async def engine(folder: Path, fault: str = "auto") -> AsyncIterator[Running]:
    start = EngineStart(EngineConfig(attention=fault), str(folder), core=stub_core.NAME)
    child = await Child.start("engine", "tabstop.engine.process", start)
    try:
        yield Running(child, wire.address(folder))
    finally:
        child.end()
        await child.finish(PATIENCE)


@asynccontextmanager
async def client(running: Running, number: int = 1, **options: object) -> AsyncIterator[ProcessClient]:
    made = ProcessClient(running.address, number, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        await made.close()


def submit(
    client: ProcessClient, *, prompt: list[int] | None = None, max_tokens: int = 5, num_samples: int = 1
) -> Submit:
    return Submit(
        client.new_request_id(), pack_ids(prompt or [1, 2, 3]), Sampling(), Limits(max_tokens), num_samples=num_samples
    )


async def collect(stream: AsyncIterator[Delta]) -> dict[int, list[Delta]]:
    samples: dict[int, list[Delta]] = {}
    async with asyncio.timeout(PATIENCE):
        async for delta in stream:
            samples.setdefault(delta.sample, []).append(delta)
    return samples


async def until_idle(client: ProcessClient) -> None:
    """Waits for a report of an empty engine."""
    async with asyncio.timeout(PATIENCE):
        while True:
            await asyncio.sleep(0.02)
            stats = await client.command("stats")
            if stats["num_running"] == 0:
                return


async def next_report(client: ProcessClient) -> None:
    newest = client.stats
    async with asyncio.timeout(PATIENCE):
        while client.stats is newest:  # every report is a new object
            await asyncio.sleep(0.02)


async def test_tokens_arrive_in_order_and_each_sample_ends_once(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        assert (await c.ready()).model == "stub"
        samples = await collect(c.submit(submit(c, max_tokens=30, num_samples=3)))
        assert sorted(samples) == [0, 1, 2]
        for deltas in samples.values():
            assert [token for delta in deltas for token in delta.token_ids] == list(range(3, 33))
            assert [delta.finish for delta in deltas][-1] is FinishReason.LENGTH
            assert all(delta.finish is None for delta in deltas[:-1])
        assert c.num_open == 0


async def test_a_reader_that_is_behind_gets_waiting_deltas_merged(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        slow = c.submit(submit(c, max_tokens=20))
        await collect(c.submit(submit(c, max_tokens=40)))  # delivery of this one does not wait for the other's reader
        [deltas] = (await collect(slow)).values()
        assert len(deltas) == 1
        assert deltas[0].token_ids == list(range(3, 23)) and deltas[0].finish is FinishReason.LENGTH


async def test_closing_a_stream_early_aborts_its_request(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        stream = c.submit(submit(c, max_tokens=100_000))
        await anext(stream)
        await stream.aclose()
        await until_idle(c)
        assert (await c.command("stats"))["aborts"] == {"decoding": 1}
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_abort_of_one_sample_leaves_the_others(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        request = submit(c, max_tokens=50, num_samples=2)
        stream = c.submit(request)
        c.abort(request.request_id, (1,), FinishReason.SUPERSEDED)
        samples = await collect(stream)
        assert samples[1][-1].finish is FinishReason.SUPERSEDED
        assert samples[0][-1].finish is FinishReason.LENGTH
        c.abort((1, 999))  # unknown: ignored


async def test_a_front_end_that_is_gone_has_its_requests_aborted_and_is_not_heard_again(folder: Path) -> None:
    async with engine(folder) as running, client(running, wire.SUPERVISOR) as supervisor, client(running, 1) as dead:
        await dead.ready()
        dead.submit(submit(dead, max_tokens=100_000, num_samples=4))
        await dead.command("ledger")  # the engine has the request
        await supervisor.command("front_end_gone", {"front_end": 1})
        await until_idle(supervisor)
        dead.submit(submit(dead, max_tokens=100_000))  # late mail
        async with client(running, 2) as successor:
            await successor.ready()
            assert len(await collect(successor.submit(submit(successor)))) == 1
        assert (await supervisor.command("stats"))["num_running"] == 0


async def test_it_answers_while_loading(folder: Path) -> None:
    seen: list[Progress] = []
    async with engine(folder, "slow-load") as running, client(running, on_progress=seen.append) as c:
        with pytest.raises(UnavailableError):
            await c.command("ledger")
        with pytest.raises(UnavailableError, match="loading"):
            _ = c.info
        [deltas] = (await collect(c.submit(submit(c)))).values()
        assert deltas[0].failure is not None and deltas[0].failure.code == "unavailable"
        await c.ready()
        assert c.info.model == "stub"
    assert Progress("weights", 0, 100) in seen


async def test_it_reports_while_idle_and_during_a_long_step(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        await next_report(c)
        stream = c.submit(submit(c, prompt=[stub_core.SLOW], max_tokens=1))
        await asyncio.sleep(0.3)  # the step has begun
        await next_report(c)
        assert c.num_open == 1  # so the report came while the step ran
        await collect(stream)


async def test_draining_refuses_new_requests_and_finishes_old_ones(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        old = c.submit(submit(c, max_tokens=20))
        assert await c.command("drain") == {"num_open": 1}
        [refused] = (await collect(c.submit(submit(c)))).values()
        assert refused[0].failure is not None and refused[0].failure.code == "unavailable"
        [deltas] = (await collect(old)).values()
        assert deltas[-1].finish is FinishReason.LENGTH


async def test_commands_answer_or_say_what_is_wrong(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        assert await c.command("ledger") == {
            "total": 1000,
            "used": 0,
            "waste": 0,
            "reserved": 0,
            "cached": 0,
            "free": 1000,
        }
        with pytest.raises(InputError, match="unknown command 'nonsense'; known: drop, ledger"):
            await c.command("nonsense")
        with pytest.raises(InputError, match="needs the argument 'front_end'"):
            await c.command("front_end_gone")
        with pytest.raises(InputError, match="'token_ids'"):
            await c.command("warm", {"token_ids": "abc"})
        with pytest.raises(InputError, match="between 0 and 511"):
            await c.command("warm", {"token_ids": [1, 999]})
        with pytest.raises(InputError, match="must be 1 to"):
            await c.command("warm", {"token_ids": []})
        with pytest.raises(NotSupportedError):
            await c.command("pin")
        assert await c.command("warm", {"token_ids": [1, 2]}) == 2


async def test_bad_frames_are_dropped_and_the_engine_lives(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        foreign = Submit((7, 0), pack_ids([1]), Sampling(), Limits(5))
        misaligned = Submit((9, 0), b"abc", Sampling(), Limits(5))
        frames = [b"", b"\x00" * 100, b"\xc1", wire.encode(foreign), wire.encode(misaligned), b"\x94" * 10_000]
        with zmq.Context() as context, context.socket(zmq.DEALER) as rogue:
            rogue.setsockopt(zmq.IDENTITY, b"9")
            rogue.setsockopt(zmq.LINGER, 1000)
            rogue.connect(running.address)
            for frame in frames:
                rogue.send(frame)
                rogue.send_multipart([frame, frame])
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.IDENTITY, b"no number")
            stranger.setsockopt(zmq.LINGER, 1000)
            stranger.connect(running.address)
            stranger.send(wire.encode(foreign))
        assert len(await collect(c.submit(submit(c)))) == 1


async def test_a_second_request_with_an_id_in_use_is_dropped(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        request = submit(c, max_tokens=20)
        stream = c.submit(request)
        c._send(request)
        [deltas] = (await collect(stream)).values()
        assert [token for delta in deltas for token in delta.token_ids] == list(range(3, 23))


async def test_a_frame_over_the_cap_is_refused_at_both_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        with zmq.Context() as context, context.socket(zmq.DEALER) as rogue:
            rogue.setsockopt(zmq.IDENTITY, b"9")
            rogue.setsockopt(zmq.LINGER, 1000)
            rogue.connect(running.address)
            rogue.send(bytes(wire.MAX_FRAME_BYTES + 1))
        monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 1000)
        [deltas] = (await collect(c.submit(submit(c, prompt=[1] * 1000)))).values()
        assert deltas[0].failure is not None and deltas[0].failure.code == "payload_too_large"
        assert len(await collect(c.submit(submit(c)))) == 1


async def test_a_broken_core_ends_every_open_request_and_the_process_with_70(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        open_stream = c.submit(submit(c, max_tokens=100_000, num_samples=2))
        await anext(open_stream)
        c.submit(submit(c, prompt=[stub_core.CRASH]))
        samples = await collect(open_stream)
        assert sorted(samples) == [0, 1]
        for deltas in samples.values():
            assert deltas[-1].finish is FinishReason.ERROR
            assert deltas[-1].failure is not None and deltas[-1].failure.code == "internal_error"
        assert await running.exit_code() == 70


@pytest.mark.parametrize(("fault", "code", "told"), [("startup-error", 2, True), ("broken-load", 70, False)])
async def test_an_engine_that_cannot_start_says_so_by_its_exit_code(
    folder: Path, fault: str, code: int, told: bool
) -> None:
    async with engine(folder, fault) as running:
        messages = await running.told()
        assert await running.exit_code() == code
        assert messages == (["the stub does not fit; choose a smaller stub"] if told else [])


async def test_it_ends_with_its_stdin_and_removes_the_run_folder(folder: Path) -> None:
    async with engine(folder, "slow-load") as running:
        async with client(running) as c:
            with pytest.raises(UnavailableError):
                await c.command("ledger")  # it is up, and still loading
        running.child.end()
        assert await running.exit_code() == 0
        assert not folder.exists()


async def test_a_dead_engine_ends_present_and_future_requests(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        stream = c.submit(submit(c, max_tokens=100_000, num_samples=2))
        await anext(stream)
        running.child.kill()
        await running.exit_code()
        command = asyncio.create_task(c.command("ledger"))
        await asyncio.sleep(0)
        c.fail("the engine process died")
        c.fail("a later reason does not replace the first")
        samples = await collect(stream)
        assert [deltas[-1].failure.code for deltas in samples.values() if deltas[-1].failure] == ["engine_dead"] * 2
        with pytest.raises(EngineDeadError, match="process died"):
            await command
        for verb in (lambda: c.info, lambda: c.submit(submit(c)), lambda: c.abort((1, 0))):
            with pytest.raises(EngineDeadError, match="process died"):
                verb()
        assert await c.wait_dead() == "the engine process died"


async def test_a_silent_engine_counts_as_dead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_SECONDS", 0.01)
    alone = ProcessClient(wire.address(folder), 1, silence_limit=0.2)  # nobody is at the other end
    with pytest.raises(EngineDeadError, match="stopped responding"):
        await asyncio.wait_for(alone.ready(), PATIENCE)
    await alone.close()


async def test_settings_are_read_to_the_byte(folder: Path) -> None:
    """What follows the settings on stdin is left for whoever watches it."""
    script = "import os, sys; from tabstop import pipes; print(pipes.read_settings(list[int]), os.read(0, 100))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate(pipes.to_line([1, 2]) + b"rest")
    assert out.decode().split() == ["[1,", "2]", "b'rest'"]


async def test_requests_that_no_report_can_have_counted_are_counted_here(folder: Path) -> None:
    async with engine(folder) as running, client(running) as c:
        await c.ready()
        await next_report(c)
        streams = [c.submit(submit(c, max_tokens=400)) for _ in range(3)]
        assert c.num_unreported == 3
        await anext(streams[2])
        async with asyncio.timeout(PATIENCE):
            while c.stats.num_running < 3:
                await next_report(c)
        assert c.num_unreported == 0
        for stream in streams:
            await stream.aclose()
        await until_idle(c)
        late = c.submit(submit(c, max_tokens=1))
        assert c.num_unreported == 1
        await collect(late)  # ended before any report of it
        assert c.num_unreported == 0
