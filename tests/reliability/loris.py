"""Clients that hold connections: `python -m tests.reliability.loris --connections 900`.

Connections without a request, heads and bodies that come byte by byte, answers that are not read, clients that close
only their half. The server must let go of every one of them in time, and serve all others meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.reliability.crowd import Crowd, Tally
from tests.reliability.requests import long_stream
from tests.reliability.server import Server, serving, until, write_model

LIMITS = ("--header-timeout", "5", "--body-timeout", "5", "--send-timeout", "5")
DRIP_SECONDS = 0.5
PATIENCE = 60.0  # seconds; only a hang reaches it
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"

Behaviour = Callable[[socket.socket], Awaitable[str]]


async def silent(connection: socket.socket) -> str:
    """Connects, says nothing, and waits for what comes."""
    return await _answer(connection)


async def slow_head(connection: socket.socket) -> str:
    return await _drip(connection, HEAD, b"x: y\r\n")


async def slow_body(connection: socket.socket) -> str:
    return await _drip(connection, HEAD + b"content-length: 99999\r\n\r\n{", b" ")


async def half_closed(connection: socket.socket) -> str:
    """Asks for much and closes its writing half: the server takes that for the end."""
    await _send(connection, long_stream().to_bytes())
    connection.shutdown(socket.SHUT_WR)
    return await _answer(connection)


async def unread(connection: socket.socket) -> str:
    """Asks for much, reads nothing; the server must drop the answer though the connection stays."""
    body = b'{"prompt": "x", "max_tokens": 1900, "n": 8, "stream": true, "ignore_eos": true, "logprobs": 5}'
    head = b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    await _send(connection, HEAD + head + body)
    await asyncio.sleep(PATIENCE / 6)
    return "left"


BEHAVIOURS: tuple[Behaviour, ...] = (silent, slow_head, slow_body, half_closed)


async def _send(connection: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(connection, data)


async def _answer(connection: socket.socket) -> str:
    """The status of what comes until the server closes; "closed" when nothing comes."""
    loop, data = asyncio.get_running_loop(), b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        async with asyncio.timeout(PATIENCE):
            while piece := await loop.sock_recv(connection, 1 << 16):
                data += piece
    return data[9:12].decode() or "closed"


async def _drip(connection: socket.socket, start: bytes, piece: bytes) -> str:
    """Sends a start, then pieces until the server has had enough."""
    answer = asyncio.ensure_future(_answer(connection))
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        await _send(connection, start)
        while not answer.done():
            await _send(connection, piece)
            await asyncio.wait([answer], timeout=DRIP_SECONDS)
    return await answer


async def hold(port: int, num_connections: int, behaviours: tuple[Behaviour, ...]) -> Counter[str]:
    """How so many connections ended, by behaviour."""

    async def one(index: int) -> str:
        behaviour = behaviours[index % len(behaviours)]
        with socket.socket() as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
            return f"{behaviour.__name__}: {await behaviour(connection)}"

    return Counter(await asyncio.gather(*(one(index) for index in range(num_connections))))


def besiege(server: Server, num_connections: int, num_unread: int) -> tuple[Counter[str], Tally]:
    """Holds connections while others ask; how they ended, and how the others did."""
    descriptors = server.num_descriptors()
    with Crowd(server.port, 4, pause=0.1) as crowd:
        crowd.wait_for(1)
        unread_ends = asyncio.run(hold(server.port, num_unread, (unread,))) if num_unread else Counter()
        ends = asyncio.run(hold(server.port, num_connections, BEHAVIOURS))
    share = num_connections // len(BEHAVIOURS)
    halves = {name: number for name, number in ends.items() if name in ("half_closed: 200", "half_closed: closed")}
    assert ends == Counter({"silent: closed": share, "slow_head: 408": share, "slow_body: 408": share} | halves), ends
    assert sum(halves.values()) == share, ends
    crowd.tally.assert_each_ended_once()
    assert set(crowd.tally.kinds) == {"finished"}, crowd.tally.kinds
    server.assert_idle()
    until(lambda: server.num_descriptors() <= descriptors + 2, "closed descriptors")
    return ends + unread_ends, crowd.tally


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--connections", type=int, default=4000)
    options.add_argument("--unread", type=int, default=50)
    given = options.parse_args()
    needed = given.connections + given.unread + 500
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(write_model(Path(folder) / "tiny"), *LIMITS, "--log-level", "warning") as server,
    ):
        besiege(server, len(BEHAVIOURS) * 20, 0)
        before, start = server.resident(), time.monotonic()
        ends, tally = besiege(server, given.connections, given.unread)
        growth = {name: value - before[name] for name, value in server.resident().items()}
        print(
            f"{given.connections} + {given.unread} connections let go in {time.monotonic() - start:.0f} s: {dict(ends)}"
        )
        print(f"others meanwhile: {dict(tally.kinds)}; memory grew by {growth} bytes")
        assert server.stop() == 0
        server.assert_nothing_left()


if __name__ == "__main__":
    main()
