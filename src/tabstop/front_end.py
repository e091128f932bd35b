"""The front-end process: HTTP on the inherited socket, text, and a client of the engine. Started by the supervisor.

`python -m tabstop.front_end` reads its settings as one JSON line on stdin, then events: drain, engine_dead, keys. The
end of stdin means that the supervisor is gone: it exits at once. Exit codes: 0 drained · 2 cannot start · 70 a bug.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvloop

from tabstop import logs, pipes
from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig, ServerConfig
from tabstop.engine import garbage, wire
from tabstop.engine.process_client import ProcessClient
from tabstop.errors import StartupError
from tabstop.exits import EXIT_BUG, EXIT_CANNOT_START, EXIT_STOPPED
from tabstop.heartbeats import beat, open_heartbeats
from tabstop.keys import Key, KeyRing
from tabstop.mapped import make_reserved

log = logging.getLogger(__name__)

METRICS_FILES = ("counter", "histogram", "gauge_livesum")
"""The kinds of metrics that there are, as prometheus_client names their files."""

METRICS_BYTES = 256 << 10
"""Of each file: ten times what the metrics of a model need."""


class FrontEndStart(msgspec.Struct, frozen=True):
    """What the supervisor tells a front end on stdin."""

    engine: EngineConfig
    server: ServerConfig
    folder: str  # the run folder: holds the engine's socket
    number: int  # of this front end, for ever
    socket: int  # descriptor of the listening socket
    place: int = 0  # among the front ends; a successor takes it
    keys: tuple[Key, ...] = ()  # valid now
    log: logs.LogSettings = logs.LogSettings()


async def run(start: FrontEndStart, upward: pipes.Upward) -> int:
    """Serves until drained or orphaned; the exit code. Raises StartupError."""
    from tabstop.api.ceilings import Counts
    from tabstop.api.server import run_front_end  # after the metrics' folder is set: they look for it when imported
    from tabstop.api.state import ServerState
    from tabstop.service import make_service
    from tabstop.text import TextOptions

    asyncio.get_running_loop().set_exception_handler(logs.on_loop_error)
    config = start.engine
    client = ProcessClient(wire.address(start.folder), start.number, silence_limit=start.server.engine_timeout)
    checkpoint = open_checkpoint(config.model, revision=config.revision, offline=config.offline)
    tokenizer = open_checkpoint(config.tokenizer, offline=config.offline) if config.tokenizer else None
    service = make_service(
        checkpoint,
        [client],
        start.server,
        tokenizer=tokenizer,
        options=TextOptions(config.fim, config.reasoning, config.tool_format),
    )
    stop = asyncio.Event()
    listening = socket.socket(fileno=start.socket)

    def on_ready() -> None:
        garbage.settle()
        upward.tell(pipes.READY)

    num_places = start.server.num_front_ends or start.place + 1
    counts = Counts(counts_folder(start.folder), start.place, num_places)
    state = ServerState(is_ready=False, on_ready=on_ready, keys=KeyRing(start.keys), counts=counts)
    serving = asyncio.create_task(run_front_end(service, start.server, listening, stop, state))
    orders = asyncio.create_task(follow_orders(client, stop, state.keys))
    beating = asyncio.create_task(beat(open_heartbeats(start.folder, num_places), start.place))
    await asyncio.wait([serving, orders], return_when=asyncio.FIRST_COMPLETED)
    beating.cancel()
    if serving.done():
        serving.result()
    return EXIT_STOPPED


async def follow_orders(client: ProcessClient, stop: asyncio.Event, keys: KeyRing) -> None:
    """Does what the supervisor says until it is gone."""
    reader = asyncio.StreamReader(limit=pipes.MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        event = pipes.to_event(line)
        match event.name:
            case pipes.DRAIN:
                stop.set()
            case pipes.ENGINE_DEAD:
                client.fail(event.message)
            case pipes.KEYS:
                keys.replace(event.keys)


def metrics_folder(folder: str) -> Path:
    """Where front ends keep the counters that each shows the sum of, in the run folder."""
    return Path(folder) / "metrics"


def share_metrics(folder: Path) -> None:
    """Lets this process's counters lie in the folder; without room on the disk they stay its own."""
    folder.mkdir(exist_ok=True)
    try:
        make_reserved((folder / f"{name}_{os.getpid()}.db" for name in METRICS_FILES), METRICS_BYTES)
    except OSError as error:
        log.warning("no room for metrics in %s (%s): /metrics shows one front end at a time", folder, error.strerror)
    else:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def counts_folder(folder: str) -> Path:
    """Where front ends count together what keys spend, in the run folder."""
    return Path(folder) / "counts"


def main() -> None:
    """Never returns: what threads of the application still do no longer matters."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor owns signals; it tells us to drain
    start = pipes.read_settings(FrontEndStart)
    logs.configure(start.log, f"front end {start.number}")
    upward = pipes.Upward()
    share_metrics(metrics_folder(start.folder))
    try:
        # Never closed: that would wait for the application's threads.
        code = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(run(start, upward))
    except StartupError as error:
        upward.tell(pipes.STARTUP_ERROR, error.message)
        code = EXIT_CANNOT_START
    except Exception:
        log.exception("the front end failed")
        code = EXIT_BUG
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
