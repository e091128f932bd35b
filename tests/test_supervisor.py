"""The server's processes and how they end: real supervisor, real front ends, real engine process, a stub core."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.reliability.server import runs_module
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
PATIENCE = 30.0  # seconds; only a hang reaches it
ENDLESS = 2000  # tokens: ten seconds of the stub core


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits for a true answer."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


@dataclass
class Stream:
    """An open streaming completion."""

    response: httpx.Response
    client: httpx.Client
    lines: Iterator[str]
    events: list[Any] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Our end's TCP port, by which the serving process is found."""
        return int(self.response.extensions["network_stream"].get_extra_info("client_addr")[1])

    def read_one(self) -> None:
        line = next(line for line in self.lines if line.startswith("data: "))
        self.events.append(line if line == "data: [DONE]" else json.loads(line[6:]))

    def read_all(self) -> list[Any]:
        for line in self.lines:
            if line.startswith("data: "):
                self.events.append(line if line == "data: [DONE]" else json.loads(line[6:]))
        self.response.close()
        self.client.close()
        return self.events

    @property
    def errors(self) -> list[str]:
        return [event["error"]["code"] for event in self.events if "error" in event]

    @property
    def finish_reasons(self) -> list[str]:
        choices = [choice for event in self.events if "choices" in event for choice in event["choices"]]
        return [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


class Server:
    """A running `tests.serve_stub`, its children and its port."""

    def __init__(self, model: Path, *, fault: str = "auto", **options: Any) -> None:
        self.scratch = tempfile.mkdtemp(dir="/tmp")  # short, because a socket lies in it
        self.port = free_port()
        settings = {
            "engine": {"model": str(model), "offline": True, "attention": fault},
            "server": {"port": self.port, **options},
        }
        environment = os.environ | {
            "TMPDIR": self.scratch,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serve_stub", json.dumps(settings)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pids: set[int] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def leftovers(self) -> list[str]:
        return os.listdir(self.scratch)

    def children(self, module: str = "tabstop.") -> list[psutil.Process]:
        """Children that run a module whose name starts so, oldest first."""
        found = [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE and runs_module(child, module)
        ]
        self.pids |= {child.pid for child in found}
        return sorted(found, key=lambda child: (child.create_time(), child.pid))

    @property
    def engine(self) -> psutil.Process:
        return self.children("tabstop.engine")[0]

    @property
    def front_ends(self) -> list[psutil.Process]:
        return self.children("tabstop.front_end")

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        try:
            return httpx.get(f"{self.url}/readyz", timeout=PATIENCE).status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> None:
        until(self.is_ready, "readiness")
        self.children()

    def ready_status(self) -> int:
        return httpx.get(f"{self.url}/readyz", timeout=PATIENCE).status_code

    def stream(self, max_tokens: int = ENDLESS) -> Stream:
        """Opens a stream and reads its first token."""
        client = httpx.Client(timeout=PATIENCE)
        body = {"model": "tiny", "prompt": "def f", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        response = client.send(client.build_request("POST", f"{self.url}/v1/completions", json=body), stream=True)
        assert response.status_code == 200, response.read()
        stream = Stream(response, client, response.iter_lines())
        stream.read_one()
        return stream

    def serving(self, stream: Stream) -> psutil.Process:
        """The front end that has the other end of a stream."""
        for child in self.front_ends:
            for connection in child.net_connections("tcp"):
                if connection.raddr and connection.raddr.port == stream.port:
                    return child
        raise AssertionError("no front end has that connection")

    def end(self) -> tuple[int, str]:
        """Waits for the exit: code and stderr."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        print(errors)
        return self.process.returncode, errors

    def assert_nothing_left(self) -> None:
        until(lambda: not any(is_alive(pid) for pid in self.pids), f"the end of {self.pids}")
        assert self.leftovers == []
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        if self.process.stderr is not None and not self.process.stderr.closed:
            print(self.process.communicate()[1])  # shown when the test fails
        until(lambda: not any(is_alive(pid) for pid in self.pids), f"the end of {self.pids}")
        shutil.rmtree(self.scratch, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """False for a zombie too: nobody but the system's init can take those away."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start(model: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*, ready: bool = True, **options: Any) -> Server:
        servers.append(Server(model, **options))
        if ready:
            servers[-1].wait_ready()
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_signal_drains_and_leaves_nothing(start: Callable[..., Server], number: int) -> None:
    server = start()
    [folder] = server.leftovers
    assert os.stat(f"{server.scratch}/{folder}").st_mode & 0o777 == 0o700
    stream = server.stream(max_tokens=200)
    server.process.send_signal(number)
    events = stream.read_all()
    assert stream.finish_reasons == ["length"] and stream.errors == [] and events[-1] == "data: [DONE]"
    code, _ = server.end()
    assert code == 0
    server.assert_nothing_left()


def test_while_draining_the_server_is_not_ready(start: Callable[..., Server]) -> None:
    server = start()
    stream = server.stream(max_tokens=400)
    assert server.ready_status() == 200
    server.process.send_signal(signal.SIGTERM)
    until(lambda: not is_accepting(server), "503 or a closed port")
    stream.read_all()
    assert stream.finish_reasons == ["length"]
    assert server.end()[0] == 0


def is_accepting(server: Server) -> bool:
    try:
        return server.ready_status() == 200
    except httpx.TransportError:
        return False


def test_a_drain_that_takes_too_long_ends_the_streams(start: Callable[..., Server]) -> None:
    server = start(drain_timeout=0.5)
    stream = server.stream()
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 0
    stream.response.close()
    server.assert_nothing_left()


def test_a_second_signal_ends_at_once(start: Callable[..., Server]) -> None:
    server = start()
    stream = server.stream()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: not is_accepting(server), "the drain")
    assert server.process.poll() is None  # the stream holds it
    server.process.send_signal(signal.SIGTERM)
    assert server.end()[0] == 128 + signal.SIGTERM
    stream.response.close()
    server.assert_nothing_left()


def test_a_closed_terminal_may_say_so_twice(start: Callable[..., Server]) -> None:
    server = start()
    stream = server.stream(max_tokens=400)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: not is_accepting(server), "the drain")
    server.process.send_signal(signal.SIGHUP)
    stream.read_all()
    assert stream.finish_reasons == ["length"] and server.end()[0] == 0


def test_under_nohup_the_terminal_may_close(start: Callable[..., Server]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        server = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    server.process.send_signal(signal.SIGHUP)
    stream = server.stream(max_tokens=100)
    stream.read_all()
    assert stream.finish_reasons == ["length"] and server.ready_status() == 200


def test_a_signal_while_loading_ends_at_once(start: Callable[..., Server]) -> None:
    server = start(ready=False, fault="slow-load")
    until(lambda: len(server.children()) == 2, "children")
    server.process.send_signal(signal.SIGINT)
    assert server.end()[0] == 0
    server.assert_nothing_left()


def test_a_dead_front_end_loses_only_its_own_requests(start: Callable[..., Server]) -> None:
    server = start(num_front_ends=2)
    until(lambda: len(server.front_ends) == 2, "two front ends")
    streams = [server.stream()]
    while len({server.serving(stream).pid for stream in streams}) < 2:  # the kernel chooses who accepts
        streams.append(server.stream())
        assert len(streams) < 200
    victim = server.serving(streams[-1])
    mine = [stream for stream in streams if server.serving(stream).pid != victim.pid]
    victim.kill()
    until(lambda: num_running(server) == len(mine), "the aborts")
    until(lambda: len(server.front_ends) == 2, "a new front end")
    assert victim.pid not in [child.pid for child in server.front_ends]
    mine[0].read_one()  # still served
    for stream in streams:
        stream.response.close()
    until(lambda: num_running(server) == 0, "an empty engine")
    assert server.process.poll() is None


def num_running(server: Server) -> int:
    """From the metrics, which any front end answers for the whole server."""
    try:
        text = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
    except httpx.TransportError:
        return -1
    rows = [line.split() for line in text.splitlines() if line.startswith("tabstop_num_requests_running")]
    return int(float(rows[0][1]))


def test_a_dead_engine_ends_every_stream_and_the_server(start: Callable[..., Server]) -> None:
    server = start(num_front_ends=2)
    streams = [server.stream() for _ in range(4)]
    server.engine.kill()
    assert until(lambda: 0 if is_accepting(server) else 1, "not ready")
    for stream in streams:
        stream.read_all()
        assert stream.errors == ["engine_dead"] and stream.finish_reasons == []
    assert server.end()[0] == 70
    server.assert_nothing_left()


def test_an_engine_that_cannot_start_ends_the_server_with_one_line(start: Callable[..., Server]) -> None:
    server = start(ready=False, fault="startup-error")
    code, errors = server.end()
    assert code == 1
    assert errors.splitlines()[-1] == "error: the stub does not fit; choose a smaller stub"
    assert "Traceback" not in errors
    server.assert_nothing_left()


def test_an_engine_that_breaks_while_loading_ends_the_server_with_70(start: Callable[..., Server]) -> None:
    server = start(ready=False, fault="broken-load")
    code, errors = server.end()
    assert code == 70 and "planted fault while loading" in errors
    server.assert_nothing_left()


def test_front_ends_that_cannot_start_end_the_server(
    start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "import os, sys\nif 'tabstop.front_end' in sys.orig_argv: os._exit(5)\n"
    (tmp_path / "sitecustomize.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, errors = start(ready=False).end()
    assert code == 70
    assert [line.split(": ", 1)[1] for line in errors.splitlines() if " error " in line] == [
        "front end 1 ended with code 5",
        "front end 2 ended with code 5",
        "front end 3 ended with code 5",
        "front ends cannot start; the server stops",
    ]


def test_a_port_in_use_is_one_line(start: Callable[..., Server]) -> None:
    first = start()
    second = start(ready=False, port=first.port)
    code, errors = second.end()
    assert code == 1
    assert errors.splitlines()[-1].startswith(f"error: cannot bind 127.0.0.1:{first.port}")


def test_children_leave_when_the_supervisor_is_killed(start: Callable[..., Server]) -> None:
    server = start()
    server.process.kill()
    server.process.communicate()
    server.assert_nothing_left()


def test_the_key_is_in_no_command_line_and_no_environment(start: Callable[..., Server]) -> None:
    server = start(api_key="sk-canary-1234")
    for child in server.children():
        assert not any("canary" in argument for argument in child.cmdline())
        assert not any("canary" in value for value in child.environ().values())
