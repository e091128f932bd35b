"""`tabstop serve`: starts the engine and the front ends, watches them, owns signals and the exit code.

Knows processes, not models and not HTTP: it imports no torch and no fastapi. Its promises:
- SIGTERM or Ctrl-C: /readyz says 503, open requests end (drain_timeout at most), exit 0; a second one: exit at once.
- A terminal that closes (SIGHUP) is as SIGTERM, once, and nothing under nohup. With --key-file any other SIGHUP reads
  that file again; a bad file leaves the keys as they were.
- A front end that dies, or freezes and is killed for it, has its requests aborted and is started again, ever more
  slowly; one that cannot start three times in a row ends the server.
- An engine that dies ends every stream with an error; after a short grace the server exits 70 (2: it could not start).
- When it has ended, there is no process, no socket and no file left of it. Should it be killed, its children see their
  stdin end and leave, the engine with the run folder.

Exit codes: 0 asked to stop · 2 cannot start (one line on stderr says why) · 70 a part failed · 128 + n second signal n.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import resource
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from tabstop import logs, pipes
from tabstop.checkpoint import open_checkpoint
from tabstop.children import Child
from tabstop.config import EngineConfig, ServerConfig
from tabstop.device import default_num_front_ends
from tabstop.engine import recorder, wire
from tabstop.engine.process import EngineStart
from tabstop.engine.process_client import ProcessClient
from tabstop.errors import ConfigError, EngineDeadError, StartupError, TabstopError
from tabstop.exits import EXIT_BUG, EXIT_CANNOT_START, EXIT_STOPPED
from tabstop.front_end import FrontEndStart, counts_folder, metrics_folder
from tabstop.heartbeats import Heartbeats, open_heartbeats, wait_silent
from tabstop.keys import Key, read_keys
from tabstop.pipes import Event
from tabstop.startup import StartupView

log = logging.getLogger(__name__)

LISTEN_BACKLOG = 2048
DEATH_GRACE_SECONDS = 2.0
"""How long front ends go on after the engine died: streams get their error, probes see 503."""

END_PATIENCE_SECONDS = 2.0
"""How long a child may take to leave when asked, before it is killed."""

FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
MAX_FAILED_STARTS = 3
SHORT_LIFE_SECONDS = 60.0
"""A front end that lived longer is started again without delay for what happened before."""

MAX_SOCKET_PATH_BYTES = 100
"""Unix socket addresses hold 104 (macOS) or 108 (Linux) bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """Why and how the server ends."""

    code: int
    message: str = ""  # shown as the error line when the server cannot start
    drain_seconds: float = 0.0  # how long open requests may go on


def open_listening_socket(host: str, port: int) -> socket.socket:
    """Binds and listens. Raises ConfigError when the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot bind {host}:{port} ({error.strerror}); choose another --port or --host, or end what uses it"
        ) from None
    listening.listen(LISTEN_BACKLOG)
    return listening


@contextlib.contextmanager
def run_folder() -> Iterator[str]:
    """A folder that only we can enter; removed at the end."""
    folder = tempfile.mkdtemp(prefix="tabstop-")
    if len(wire.address(folder)) > MAX_SOCKET_PATH_BYTES:
        shutil.rmtree(folder)
        folder = tempfile.mkdtemp(prefix="tabstop-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Supervisor:
    """One life of the server. Everything happens on one event loop; `run` returns the exit code."""

    def __init__(
        self, engine: EngineConfig, server: ServerConfig, *, core: str = "tabstop.engine.build:build_core"
    ) -> None:
        """`core`: see EngineStart."""
        self.engine = engine
        self._num_front_ends = server.num_front_ends or default_num_front_ends()
        self.server = dataclasses.replace(server, num_front_ends=self._num_front_ends)
        self._keys: tuple[Key, ...] = ()
        self._heartbeats: Heartbeats | None = None  # of front ends
        self._had_terminal = has_terminal()
        self.core = core
        self.log = logs.LogSettings(server.log_level, server.log_format, server.log_prompts)
        self.view = StartupView(plain=server.log_format == "json")
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._second_signal: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._children: list[Child] = []  # alive, the engine first
        self._num_started = 0  # front ends so far: the newest one's number
        self._num_ready = 0
        self._all_ready = asyncio.Event()

    async def run(self) -> int:
        """Starts everything and stays until the end. Raises StartupError when the server cannot start."""
        self._keys = read_keys(self.server.key_file) if self.server.key_file else ()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold prompts; children inherit it
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if self.server.key_file or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks us to stay
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._signalled, number)
        with run_folder() as folder, open_listening_socket(self.server.host, self.server.port) as listening:
            counts_folder(folder).mkdir()
            self._heartbeats = open_heartbeats(folder, self._num_front_ends)
            client = ProcessClient(
                wire.address(folder),
                wire.SUPERVISOR,
                on_progress=self.view.show_progress,
                silence_limit=self.server.engine_timeout,
            )
            try:
                return await self._supervise(folder, listening, client)
            finally:
                self.view.close()
                for child in self._children:
                    child.kill()
                await asyncio.gather(*(child.wait() for child in self._children))
                await client.close()

    async def _supervise(self, folder: str, listening: socket.socket, client: ProcessClient) -> int:
        watchers = [
            self._keep_engine(folder, client),
            *(self._keep_front_end(folder, listening, client, place) for place in range(self._num_front_ends)),
            self._announce(listening, client),
        ]
        tasks = [asyncio.create_task(watcher) for watcher in watchers]
        for task in tasks:
            task.add_done_callback(self._watcher_ended)
        try:
            ending = await self._ending
            listening.close()
            await self._end(ending)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if ending.code == EXIT_CANNOT_START:
            raise StartupError(ending.message)
        return 128 + self._second_signal.result() if self._second_signal.done() else ending.code

    def _watcher_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, EngineDeadError):  # that is _keep_engine's business
            log.error("the supervisor failed", exc_info=error)
            self._decide(Ending(EXIT_BUG))

    # ---- why it ends

    def _decide(self, ending: Ending) -> None:
        """The first reason counts."""
        if not self._ending.done():
            self._ending.set_result(ending)

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP and self.server.key_file and has_terminal() >= self._had_terminal:
            self._read_keys(self.server.key_file)
        elif not self._ending.done():
            log.info("stopping: open requests have %g s", self.server.drain_timeout)
            self._decide(Ending(EXIT_STOPPED, drain_seconds=self.server.drain_timeout))
        elif number != signal.SIGHUP and not self._second_signal.done():  # kernel and shell both send it for one end
            self._second_signal.set_result(number)

    def _read_keys(self, path: str) -> None:
        try:
            self._keys = read_keys(path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error.message)
            return
        log.info("read %d keys from %s", len(self._keys), path)
        for child in self._children:
            if child.name != "engine":
                child.tell(Event(pipes.KEYS, keys=self._keys))

    async def _end(self, ending: Ending) -> None:
        """Ends the front ends, then the engine; at once after a second signal."""
        ended = asyncio.create_task(self._end_children(ending))
        either: list[asyncio.Future[Any]] = [ended, self._second_signal]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ended

    async def _end_children(self, ending: Ending) -> None:
        front_ends = [child for child in self._children if child.name != "engine"]
        engines = [child for child in self._children if child.name == "engine"]
        if ending.code == EXIT_BUG and self._num_ready > 0:
            await asyncio.sleep(DEATH_GRACE_SECONDS)
        for child in front_ends:
            child.tell(Event(pipes.DRAIN))
        await asyncio.gather(*(child.finish(ending.drain_seconds + END_PATIENCE_SECONDS) for child in front_ends))
        for child in engines:
            child.end()
        await asyncio.gather(*(child.finish(END_PATIENCE_SECONDS) for child in engines))

    # ---- the engine

    async def _keep_engine(self, folder: str, client: ProcessClient) -> None:
        settings = EngineStart(self.engine, folder, self.log, self.core)
        child = await Child.start("engine", "tabstop.engine.process", settings)
        self._children.insert(0, child)
        silence = asyncio.create_task(self._kill_when_silent(child, client))
        message = "the engine process ended before it could serve; its log tells why"
        async for event in child.events():
            if event.name == pipes.STARTUP_ERROR:
                message = event.message
        code = await child.wait()
        silence.cancel()
        self._children.remove(child)
        if self._ending.done():
            return
        if code == EXIT_CANNOT_START:
            self._decide(Ending(EXIT_CANNOT_START, message))
            return
        in_hand = [recorder.name_of(request_id) for request_id in recorder.read(folder)]
        log.error("the engine ended with code %d; the server stops", code)
        log.error("it had these requests in hand (engine_ids of other lines): %s", ",".join(in_hand) or "none")
        client.fail("the engine process died")
        for front_end in self._children:
            front_end.tell(Event(pipes.ENGINE_DEAD, "the engine process died; the server is stopping"))
        self._decide(Ending(EXIT_BUG))

    async def _kill_when_silent(self, child: Child, client: ProcessClient) -> None:
        await client.wait_dead()
        child.kill()

    # ---- front ends

    async def _keep_front_end(self, folder: str, listening: socket.socket, client: ProcessClient, place: int) -> None:
        """Starts a front end again and again."""
        num_failed_starts, num_short_lives = 0, 0
        while not self._ending.done():
            self._num_started += 1
            number, start = self._num_started, time.monotonic()
            try:
                was_ready, code = await self._run_front_end(folder, listening, number, place)
            except OSError as error:  # no descriptor, process or memory is left: worth dying for if nobody else serves
                log.error("front end %d cannot be started: %s", number, error.strerror)
                was_ready, code = any(child.name != "engine" for child in self._children), EXIT_BUG
            if self._ending.done():
                return
            log.error("front end %d ended with code %d", number, code)
            num_failed_starts = 0 if was_ready else num_failed_starts + 1
            num_short_lives = 0 if time.monotonic() > start + SHORT_LIFE_SECONDS else num_short_lives + 1
            if num_failed_starts == MAX_FAILED_STARTS:
                log.error("front ends cannot start; the server stops")
                self._decide(Ending(EXIT_BUG))
                return
            with contextlib.suppress(TabstopError):  # a dead engine has none of its requests
                await client.command("front_end_gone", {"front_end": number})
            await asyncio.sleep(min(FIRST_BACKOFF_SECONDS * 2 ** max(0, num_short_lives - 1), MAX_BACKOFF_SECONDS))

    async def _run_front_end(self, folder: str, listening: socket.socket, number: int, place: int) -> tuple[bool, int]:
        """One life of a front end: whether it ever was ready, and its exit code."""
        if self._heartbeats is not None:
            self._heartbeats.forget(place)
        given = (number, listening.fileno(), place, self._keys)
        settings = FrontEndStart(self.engine, self.server, folder, *given, self.log)
        child = await Child.start(f"front end {number}", "tabstop.front_end", settings, [listening.fileno()])
        self._children.append(child)
        if settings.keys is not self._keys:  # read again meanwhile
            child.tell(Event(pipes.KEYS, keys=self._keys))
        silence = asyncio.create_task(self._kill_when_frozen(child, place))
        was_ready = False
        async for event in child.events():
            if event.name == pipes.READY:
                was_ready = True
                self._num_ready += 1
                if self._num_ready == self._num_front_ends:
                    self._all_ready.set()
            elif event.name == pipes.STARTUP_ERROR:
                self._decide(Ending(EXIT_CANNOT_START, event.message))
        code = await child.wait()
        silence.cancel()
        self._children.remove(child)
        # Its gauges end with it; its counters stay.
        mark_process_dead(child.pid, str(metrics_folder(folder)))  # type: ignore[no-untyped-call]
        return was_ready, code

    async def _kill_when_frozen(self, child: Child, place: int) -> None:
        await wait_silent(self._heartbeats, place, self.server.engine_timeout)
        log.error("%s gave no sign of life for %g s; killing it", child.name, self.server.engine_timeout)
        child.kill()

    async def _announce(self, listening: socket.socket, client: ProcessClient) -> None:
        host, port = listening.getsockname()[:2]
        await self._all_ready.wait()
        info = await client.ready()  # front ends may hear of it before we do
        self.view.show_table(info, f"http://{f'[{host}]' if ':' in host else host}:{port}")


async def _run(engine: EngineConfig, server: ServerConfig) -> int:
    return await Supervisor(engine, server).run()


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Runs a server until it is told to stop; its exit code. Raises StartupError when it cannot start."""
    logs.configure(logs.LogSettings(server.log_level, server.log_format, server.log_prompts), "supervisor")
    open_checkpoint(engine.model, revision=engine.revision, offline=engine.offline)  # downloads once, or says why not
    return asyncio.run(_run(dataclasses.replace(engine, offline=True), server))
