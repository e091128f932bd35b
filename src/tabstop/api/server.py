"""Runs the HTTP application of one front-end process on a listening socket that somebody else opened.

Knows uvicorn, warm-up and drain. Knows no signals (the process that calls it owns them) and no engine process.

The caller's side of the contract, in the front-end process:

    service = make_service(checkpoint, [client], server_config, tokenizer=None)      # tabstop.service
    stop = asyncio.Event()                                                           # set it on SIGTERM or SIGINT
    await run_front_end(service, server_config, listening_socket, stop)

`listening_socket` is bound and listening; several processes may share it; it is closed here. /livez answers 200 from
the start, /readyz 503 until one real token came through the service. When `stop` is set, /readyz turns 503 at once, new
requests get 503 with Retry-After, open ones have `config.drain_timeout` seconds to end, the rest end with one error
event; then the sockets close and the call returns. Cancelling the call stops at once. An engine that dies does not end
the call: its supervisor decides. Nothing is printed; logs go to the loggers `tabstop.*`.
"""

from __future__ import annotations

import asyncio
import socket

from tabstop.config import ServerConfig
from tabstop.service import Service


async def run_front_end(
    service: Service, config: ServerConfig, listening_socket: socket.socket, stop: asyncio.Event
) -> None:
    """Serves until `stop` is set and open requests have drained (see the module's docstring)."""
    raise NotImplementedError
