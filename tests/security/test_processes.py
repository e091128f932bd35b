"""What the machine sees of a server, and what one tenant sees of another: `tabstop serve` over a real, tiny model."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tabstop.keys import Key, append_key, digest_of
from tests.reliability.server import Server, serving, write_model

LONG = "def f(x):\n    return x\n" * 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("security")
    for name, tenant in (("red", "one"), ("blue", "one"), ("other", "two"), ("alone", None)):
        append_key(folder / "keys", Key(name, digest_of(name).hex(), ("infer", "admin"), tenant))
    options = ("--num-front-ends", "2", "--key-file", str(folder / "keys"))
    with serving(write_model(folder / "tiny"), *options) as running:
        yield running
        assert running.stop() == 0
        running.assert_nothing_left()


def cached(server: Server, key: str, **body: object) -> int:
    """Tokens that a request of this key finds, on a connection of its own."""
    request = {"prompt": LONG, "max_tokens": 1, "temperature": 0} | body
    answer = httpx.post(server.url + "/v1/completions", json=request, headers={"api-key": key}, timeout=60)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["prompt_tokens"] > 100
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_cve_2025_46570_2026_105754_no_tenant_finds_the_blocks_of_another(server: Server) -> None:
    """A shared prefix cache tells by its speed what others asked; keys that clients choose must not lead into it."""
    assert cached(server, "red") == 0
    for _ in range(6):  # whichever front end it is
        assert cached(server, "red") > 100
    assert cached(server, "blue") > 100
    for stranger in ("other", "alone"):
        for salt in ("one", "one\0tiny", "\0one"):
            assert cached(server, stranger, cache_salt=salt) == 0
        assert cached(server, stranger, session="red", user="red", prompt_cache_key="one") == 0
        assert cached(server, stranger) > 100  # its own


def test_cve_2025_30202_one_port_on_loopback_and_a_socket_in_a_closed_folder(server: Server) -> None:
    """Others published their engines' sockets on all interfaces."""
    processes = [psutil.Process(server.process.pid), *server.children()]
    assert len(processes) == 4
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    }
    assert listening == {("127.0.0.1", server.port)}
    (folder,) = Path(server.scratch).iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
    assert stat.S_ISSOCK((folder / "engine.sock").stat().st_mode)


def test_no_process_connects_anywhere(server: Server) -> None:
    """Also not after requests: what it needs it has."""
    for text in ("http://example.com/x.png", "![](http://127.0.0.1:1/x)", "x"):
        cached(server, "red", prompt=LONG + text)
    for process in server.children():
        remote = [c.raddr for c in process.net_connections("inet") if c.raddr and c.laddr.port != server.port]
        assert remote == []
