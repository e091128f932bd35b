"""Keys in a server of several processes: read again on SIGHUP, counted together, seen in no process's papers."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tabstop.keys import Key, append_key, digest_of
from tests.test_supervisor import PATIENCE, ROOT, Server, model, until

assert model  # a fixture

FIRST, SECOND, COUNTED = "sk-planted-first", "sk-planted-second", "sk-planted-counted"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    append_key(path, Key("first", digest_of(FIRST).hex(), ("infer", "admin")))
    append_key(path, Key("counted", digest_of(COUNTED).hex(), requests_per_minute=6))
    return path


@pytest.fixture
def server(model: Path, key_file: Path) -> Iterator[Server]:
    running = Server(model, key_file=str(key_file), num_front_ends=2)
    try:
        running.wait_ready()
        until(lambda: len(running.front_ends) == 2, "two front ends")
        yield running
    finally:
        running.close()


def ask(server: Server, key: str, client: httpx.Client | None = None) -> int:
    """The status of a small completion, on a connection of its own."""
    body = {"prompt": "def f", "max_tokens": 1}
    post = httpx.post if client is None else client.post
    return post(f"{server.url}/v1/completions", json=body, headers={"api-key": key}, timeout=PATIENCE).status_code


def everywhere(server: Server, key: str) -> set[int]:
    """The statuses of many connections: the kernel chooses the front end."""
    return {
        httpx.get(f"{server.url}/v1/models", headers={"api-key": key}, timeout=PATIENCE).status_code for _ in range(12)
    }


def test_a_key_file_is_read_again(server: Server, key_file: Path) -> None:
    assert everywhere(server, FIRST) == {200} and everywhere(server, SECOND) == {401}
    content = key_file.read_text()

    append_key(key_file, Key("second", digest_of(SECOND).hex()))
    server.process.send_signal(signal.SIGHUP)
    until(lambda: everywhere(server, SECOND) == {200}, "the second key")
    assert everywhere(server, FIRST) == {200}

    victim = server.front_ends[0]
    victim.kill()  # its successor gets the keys of now
    until(lambda: len(server.front_ends) == 2 and victim.pid not in [p.pid for p in server.front_ends], "a successor")
    assert everywhere(server, SECOND) == {200}

    key_file.write_text(content + "sk-planted-in-the-file\n")
    server.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert everywhere(server, FIRST) == everywhere(server, SECOND) == {200}

    key_file.write_text(content)
    server.process.send_signal(signal.SIGHUP)
    until(lambda: everywhere(server, SECOND) == {401}, "the end of the second key")
    assert everywhere(server, FIRST) == {200}
    server.process.send_signal(signal.SIGTERM)
    code, errors = server.end()
    assert code == 0 and "the keys stay as they were: line 3 of the key file" in errors
    assert "planted" not in errors and "read 3 keys" in errors
    server.assert_nothing_left()


def test_front_ends_count_a_key_together(server: Server) -> None:
    """Six of twelve pass, wherever they arrive."""
    with httpx.Client() as one, httpx.Client() as other:
        statuses = Counter(ask(server, COUNTED, client) for _ in range(4) for client in (one, other, None))
    assert statuses == {200: 6, 429: 6}
    assert ask(server, FIRST) == 200 and ask(server, "wrong") == 401
    assert httpx.get(f"{server.url}/metrics", headers={"api-key": COUNTED}).status_code == 403
    assert httpx.get(f"{server.url}/metrics", headers={"api-key": FIRST}).status_code == 200


def test_no_key_is_in_a_command_line_or_an_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the user put into the supervisor's environment is not passed on."""
    monkeypatch.setenv("TABSTOP_API_KEY", FIRST)
    server = Server(model, api_key=SECOND)
    try:
        server.wait_ready()
        assert len(server.pids) == 2
        for pid in server.pids:
            papers = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
            assert b"tabstop" in papers and b"planted" not in papers
        assert everywhere(server, SECOND) == {200}
    finally:
        server.close()


def test_a_key_file_that_cannot_be_read_stops_the_start(model: Path, tmp_path: Path) -> None:
    server = Server(model, key_file=str(tmp_path / "nowhere"))
    code, errors = server.end()
    assert code == 1 and errors.splitlines()[-1].startswith("error: cannot read the key file")


IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "tests.serve_stub", sys.argv[1]])
"""


@pytest.mark.parametrize("first_reload", [False, True])
def test_a_terminal_that_closes_still_ends_the_server(model: Path, key_file: Path, first_reload: bool) -> None:
    """With a key file SIGHUP has two meanings; whether the terminal is still there tells them apart."""
    server = {"port": 0, "key_file": str(key_file)}
    settings = json.dumps({"engine": {"model": str(model), "offline": True}, "server": server})
    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, settings],
        **dict.fromkeys(("stdin", "stdout", "stderr"), follower),
        env=environment,
        start_new_session=True,
    )
    os.close(follower)
    try:
        read_until(leader, "Tabstop is ready")
        if first_reload:
            process.send_signal(signal.SIGHUP)
            read_until(leader, "read 2 keys")
            assert process.poll() is None
        os.close(leader)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


def read_until(terminal: int, text: str) -> None:
    output = ""
    while text not in output:
        assert select.select([terminal], [], [], PATIENCE)[0], output
        output += os.read(terminal, 4096).decode(errors="replace")
