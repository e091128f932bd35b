"""A front end over a FakeEngine on a loopback socket, in a thread with its own event loop."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tabstop.api.server import run_front_end
from tabstop.api.state import ServerState
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tabstop.keys import Key, KeyRing
from tabstop.service import Service, make_service
from tabstop.text import DEFAULT_OPTIONS, TextOptions
from tests import tiny

EOS = tiny.IM_END


def text_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint with a byte-level tokenizer and a ChatML template, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "config.json": tiny.llama_config(),
        "generation_config.json": {"eos_token_id": [tiny.IM_END, tiny.ENDOFTEXT]},
        "tokenizer.json": tiny.tokenizer_json(),
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "add_bos_token": False,
            "chat_template": tiny.CHATML_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return Checkpoint("tiny", folder=folder)


@dataclass
class Running:
    """A front end that runs; its engine and service may be looked at, not driven, from the test's thread."""

    url: str
    port: int
    service: Service
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event
    state: ServerState

    def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function on the server's loop and returns its value."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Waits for the server to get into a state; fails when it does not."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the server did not get there"
            time.sleep(0.005)

    def assert_idle(self) -> None:
        """No request, answer or text state may be left."""
        self.wait_until(lambda: not self.engine.num_live and not self.service.answers)
        assert self.service.num_text_states == 0


@contextmanager
def serving(
    checkpoint: Checkpoint,
    engine: FakeEngine,
    config: ServerConfig | None = None,
    keys: Sequence[Key] = (),
    options: TextOptions = DEFAULT_OPTIONS,
) -> Iterator[Running]:
    """Starts a front end, waits until it is ready, and drains it afterwards. `keys`: those of config.key_file."""
    config = config or ServerConfig()
    state = ServerState(is_ready=False, keys=KeyRing(keys))
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    service = make_service(checkpoint, [engine], config, options=options)
    running: list[Running] = []
    started = threading.Event()

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        running.append(Running(f"http://127.0.0.1:{port}", port, service, engine, loop, stop, state))
        started.set()
        await run_front_end(service, config, listening, stop, state)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    started.wait()
    server = running[0]
    try:
        server.wait_until(lambda: httpx.get(server.url + "/readyz").status_code == 200)
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.stop.set)
        thread.join(30)
        assert not thread.is_alive(), "the front end did not stop"
