"""Runs the HTTP application of one front-end process on a listening socket that somebody else opened.

Knows uvicorn, warm-up and drain. Knows no signals (the process that calls it owns them) and no engine process.

The caller's side of the contract, in the front-end process:

    service = make_service(checkpoint, [client], server_config, tokenizer=None)      # tabstop.service
    stop = asyncio.Event()                                                           # set it on SIGTERM or SIGINT
    await run_front_end(service, server_config, listening_socket, stop)

`listening_socket` is bound and listening; several processes may share it; it is closed here. /livez answers 200 from
the start, /readyz 503 until one real token came through the service; then `state.on_ready` is called, once. When `stop`
is set, /readyz turns 503 at once, new requests get 503 with Retry-After, open ones have `config.drain_timeout` seconds
to end, the rest end with one error event; then the sockets close and the call returns. Cancelling the call stops at
once. An engine that dies does not end the call: its supervisor decides. Nothing is printed; logs go to the loggers
`tabstop.*`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
from collections import Counter
from collections.abc import Iterator
from typing import cast

import uvicorn
from fastapi import FastAPI

from tabstop.api.app import build_app
from tabstop.api.connection import Connection
from tabstop.api.state import ServerState
from tabstop.config import ServerConfig
from tabstop.errors import TabstopError, UnavailableError
from tabstop.service import Service

log = logging.getLogger(__name__)

RETRY_WARM_UP = 0.2
"""Seconds between two tries while the engine is not there."""

KEEP_ALIVE = 75
"""Seconds that a connection may be idle between requests."""

MAX_KEEP_ALIVE = 32_767
"""Seconds between questions of the kernel to a silent client; it takes no more."""

TICK = 1
"""Seconds after which the header `date` may be old."""

CLOSE_TIMEOUT = 1
"""Seconds that connections have to take their last bytes."""


async def run_front_end(
    service: Service,
    config: ServerConfig,
    listening_socket: socket.socket,
    stop: asyncio.Event,
    state: ServerState | None = None,
) -> None:
    """Serves until `stop` is set and open requests have drained (see the module's docstring).

    `state`: the caller's, not ready yet; its keys may change at any time.
    """
    state = state or ServerState(is_ready=False)
    if listening_socket.family != socket.AF_UNIX:
        _set_options(listening_socket, config.send_timeout)
    server = _make_server(build_app(service, config, state), config)
    serving = asyncio.create_task(server.serve(sockets=[listening_socket]))
    helpers = [asyncio.create_task(_warm_up(service, state)), asyncio.create_task(stop.wait())]
    try:
        await asyncio.wait((serving, helpers[1]), return_when=asyncio.FIRST_COMPLETED)
        state.is_draining = True
        await _drain(service, server, config.drain_timeout)
    finally:
        for helper in helpers:
            helper.cancel()
        service.end_all(UnavailableError("the server is shutting down; send the request to another one", retry_after=5))
        server.end()
        await serving


def _set_options(listening: socket.socket, send_timeout: float) -> None:
    """Sets what connections inherit."""
    # asyncio sets it only on sockets that name their protocol; without it, an answer that is written in two parts waits
    # 40 ms for the client's acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client that vanished without a word is missed when it acknowledges nothing for so long: answers, or, when there
    # is nothing to send, the kernel's own questions. Otherwise one would be held for a quarter of an hour, or for ever.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_USER_TIMEOUT": math.ceil(send_timeout) * 1000,  # milliseconds; the others are seconds
        "TCP_KEEPIDLE": min(math.ceil(send_timeout / 2), MAX_KEEP_ALIVE),
        "TCP_KEEPINTVL": min(math.ceil(send_timeout / 6), MAX_KEEP_ALIVE),
        "TCP_KEEPCNT": 3,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # macOS lacks two of them
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _make_server(app: FastAPI, config: ServerConfig) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            http=cast(type[asyncio.Protocol], functools.partial(Connection, limits=config, peers=Counter())),
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
        )
    )


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers, and without waking ten times a second to look whether it shall end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # 0: writes the header `date` anew
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await self._ending.wait()


async def _warm_up(service: Service, state: ServerState) -> None:
    """Tries until every engine has generated a token; the reason why not is what /readyz says."""
    while not state.is_ready:
        try:
            await service.warm_up()
            state.is_ready = True
        except TabstopError as error:
            state.reason = f"starting: {error.message}"
        except Exception:
            log.exception("the warm-up failed")
            state.reason = "the warm-up failed; see the server's log"
        if not state.is_ready:
            await asyncio.sleep(RETRY_WARM_UP)
    state.on_ready()


async def _drain(service: Service, server: uvicorn.Server, seconds: float) -> None:
    """Waits until no request is open, at most that long."""
    if service.answers:
        log.info("waiting up to %g s for %d open requests", seconds, len(service.answers))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while service.answers or server.server_state.tasks:
                await asyncio.sleep(0.02)
