"""A front end serves for weeks: of a request that has ended nothing stays, of whatever kind it was."""

from __future__ import annotations

import asyncio
import gc
import secrets
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import uvloop

from tabstop.api.server import run_front_end
from tabstop.api.state import ServerState
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.service import make_service
from tabstop.text import TextOptions
from tabstop.text.tokenizer import Tokenizer
from tests.api.serving import EOS
from tests.reliability.client import STAYS, Patience, send
from tests.reliability.requests import SCHEMA, Ask

SAID = 'x\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
TIMES, ROUNDS = 12, 3


class Left(NamedTuple):
    """By one request."""

    num_objects: float
    num_bytes: float
    num_in_cycles: float

    @property
    def is_nothing(self) -> bool:
        return self.num_objects < 1 and self.num_bytes < 256 and self.num_in_cycles < 1


def complete(text: str, **body: object) -> Ask:
    return Ask("/v1/completions", {"prompt": text, **body}, 2 if "n" in body else 1)


def chat(text: str, **body: object) -> Ask:
    return Ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})


KINDS: dict[str, tuple[Callable[[str], Ask], Patience, str]] = {
    "completion": (complete, STAYS, "finished"),
    "choices": (lambda text: complete(text, stream=True, n=2, stop=["never"], logprobs=1), STAYS, "finished"),
    "chat": (lambda text: chat(text, stream=True), STAYS, "finished"),
    "tools": (lambda text: chat(text, stream=True, tools=[TOOL]), STAYS, "finished"),
    "schema": (lambda text: chat(text, response_format=FORM), STAYS, "finished"),
    "infill": (lambda text: Ask("/infill", {"input_prefix": text, "input_suffix": "\n"}), STAYS, "finished"),
    "invented model": (lambda text: complete(text, model=text), STAYS, "finished"),
    "left in the middle": (lambda text: complete(text, stream=True), Patience(1, is_reset=True), "left"),
    "left at once": (lambda text: complete(text, n=2), Patience(0), "left"),
    "wrong field": (lambda text: complete(text, temperature=text), STAYS, "error"),
    "too long": (lambda text: complete(text * 1000), STAYS, "error"),
    "invented path": (lambda text: Ask(f"/{text}", {}), STAYS, "error"),
}
"""What is asked with a text that no other request has, how long its client stays, and how that ends."""


@asynccontextmanager
async def front_end(checkpoint: Checkpoint, engine: FakeEngine) -> AsyncIterator[int]:
    """Gives its port. It runs on the loop of its client: one thread, so that what is counted is exact."""
    config, stop, ready = ServerConfig(), asyncio.Event(), asyncio.Event()
    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    service = make_service(checkpoint, [engine], config, options=TextOptions(tool_format="hermes"))
    state = ServerState(is_ready=False, on_ready=ready.set)
    running = asyncio.create_task(run_front_end(service, config, listening, stop, state))
    await ready.wait()
    yield port
    stop.set()
    await running


async def ask(port: int, kind: str, num_tasks: int) -> None:
    """One after another, until nothing of them runs."""
    make, patience, expected = KINDS[kind]
    for _ in range(TIMES):
        end = await send(port, make(f"x{secrets.token_hex(8)}"), patience)
        assert end.kind == expected, end
    num_calm = 0
    async with asyncio.timeout(20):
        while num_calm < 10:  # connections are accepted, read and closed in as many turns of the loop
            await asyncio.sleep(0.002)
            num_calm = 0 if len(asyncio.all_tasks()) > num_tasks else num_calm + 1


def count(engine: FakeEngine) -> tuple[int, int]:
    """Objects and bytes that Python has allocated, but for what the fake engine and the interpreter note on purpose."""
    engine.submitted = []
    sys._clear_type_cache()  # of names looked up lately
    return sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]


async def left_by_one(port: int, kind: str, engine: FakeEngine, num_tasks: int) -> Left:
    """What a request leaves. Threads start and tables double now and then; what grows, grows every time."""
    await ask(port, kind, num_tasks)
    gc.collect()
    for _ in range(ROUNDS):
        before = count(engine)
        await ask(port, kind, num_tasks)
        in_cycles = gc.collect()
        after = count(engine)
        left = Left(*((now - then) / TIMES for now, then in zip(after, before, strict=True)), in_cycles / TIMES)
        if left.is_nothing:
            break
    return left


async def left_by_each(checkpoint: Checkpoint, engine: FakeEngine) -> dict[str, Left]:
    async with front_end(checkpoint, engine) as port:
        gc.freeze()  # as a front end does
        tracemalloc.start()
        num_tasks = len(asyncio.all_tasks())
        return {kind: await left_by_one(port, kind, engine, num_tasks) for kind in KINDS}


def test_requests_leave_nothing(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Neither for ever nor in cycles: front ends collect garbage rarely."""
    engine = FakeEngine(script=scripted([*tokenizer.encode(SAID), EOS]), stop_sets={"eos": frozenset([EOS])})
    gc.disable()
    try:
        found = uvloop.run(left_by_each(checkpoint, engine))
    finally:
        tracemalloc.stop()
        gc.unfreeze()
        gc.enable()
    assert not {kind: left for kind, left in found.items() if not left.is_nothing}
