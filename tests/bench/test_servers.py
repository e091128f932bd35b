"""Commands that start nothing, and servers that answer with garbage or are hidden behind a proxy."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import shlex
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable

import psutil
import pytest

from tabstop.bench.client import Endpoint
from tabstop.bench.run import Tokenization, counter_for
from tabstop.bench.servers import Fleet, Server, answers, command_words
from tabstop.bench.tokens import RemoteCounter
from tabstop.errors import InputError
from tests.bench.test_hostile import serving, status


def test_a_command_that_starts_nothing_is_refused() -> None:
    for command, message in (("", "--start is empty"), ('"x', "No closing quotation")):
        with pytest.raises(InputError, match=message):
            command_words(command)


def test_no_proxy_stands_before_the_measured_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(urllib.request, "_opener", None)

    async def run() -> bool:
        async with serving([], get=status("200 OK")) as url:
            return await asyncio.to_thread(answers, url)

    assert asyncio.run(run())


def test_garbage_is_no_answer_and_no_tokenizer() -> None:
    async def run() -> None:
        async with serving([b"garbage\r\n\r\n"], get=b"garbage\r\n\r\n") as url:
            assert not await asyncio.to_thread(answers, url)
            with pytest.raises(InputError, match="no /tokenize"):
                await asyncio.to_thread(RemoteCounter, url)

    asyncio.run(run())


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)


def shell_with_a_stubborn_child(monkeypatch: pytest.MonkeyPatch) -> tuple[Server, list[psutil.Process]]:
    """A shell that dies of SIGTERM at once and leaves a child that does not."""
    child = f"{sys.executable} -c {shlex.quote(STUBBORN)}"
    server = Server(command=f"sh -c {shlex.quote(child + ' & wait')}")
    found: list[psutil.Process] = []

    def is_deaf(_: str) -> bool:
        assert server.log is not None and server._process is not None
        found[:] = psutil.Process(server._process.pid).children()
        return b"deaf" in server.log.read_bytes()

    monkeypatch.setattr("tabstop.bench.servers.answers", is_deaf)
    server.command += " {port}"  # so that it is asked at all
    server.start()
    return server, found


def test_children_that_outlive_their_server_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server, children = shell_with_a_stubborn_child(monkeypatch)
    server.stop()
    assert children and psutil.wait_procs(children, timeout=10)[1] == []


def test_an_interrupt_while_servers_stop_leaves_none_running(monkeypatch: pytest.MonkeyPatch) -> None:
    servers, children = zip(*(shell_with_a_stubborn_child(monkeypatch) for _ in range(2)), strict=True)
    monkeypatch.setattr(servers[1]._process, "wait", interrupted_once(servers[1]._process.wait))
    with pytest.raises(KeyboardInterrupt):
        Fleet(list(servers)).__exit__()
    everyone = [child for family in children for child in family]
    assert len(everyone) == 2 and psutil.wait_procs(everyone, timeout=10)[1] == []


def interrupted_once(wait: Callable[..., int]) -> Callable[..., int]:
    waits = iter([True])

    def waiting(*arguments: float) -> int:
        if next(waits, False):
            os.kill(os.getpid(), signal.SIGINT)
        return wait(*arguments)

    return waiting


class Locked(http.server.BaseHTTPRequestHandler):
    """A tokenizer for those who have the key."""

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["content-length"]))).get("prompt", "")
        self.send_response(200 if self.headers["authorization"] == "Bearer key" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"tokens": text.split()}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def test_a_tokenizer_behind_a_key_counts() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Locked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_port}", headers={"Authorization": "Bearer key"})
        count = counter_for(endpoint, Tokenization())
        server.shutdown()
    assert count is not None
