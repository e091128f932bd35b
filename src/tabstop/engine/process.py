"""The engine process: a plain loop around the core, and nothing that the core should decide.

inbox → core.step → one Outputs message a step and client, encoded and sent while the device runs. Knows the socket, the
clock and the commands; knows no text, no HTTP and (before the core is built) no torch. It is started by the supervisor
with its settings as one JSON line on stdin; stdin's end means that the supervisor is done with it, or gone.

Exit codes: 0 told to stop (or orphaned) · 2 cannot start, the reason is the event on stdout · 70 a bug: every open
request was ended with an error first, the traceback is in the log.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import msgspec

from tabstop import logs, pipes
from tabstop.config import EngineConfig
from tabstop.engine import garbage, wire
from tabstop.engine.commands import get_argument, run_command
from tabstop.engine.door import Bell, Door, Letter
from tabstop.engine.recorder import Recorder
from tabstop.errors import InternalError, StartupError, TabstopError, UnavailableError
from tabstop.exits import EXIT_BUG, EXIT_CANNOT_START, EXIT_STOPPED
from tabstop.kernels.cpu import build
from tabstop.types import (
    Abort,
    Command,
    Delta,
    EngineFailure,
    EngineInfo,
    FinishReason,
    Progress,
    Reply,
    RequestId,
    Stats,
    Submit,
)

log = logging.getLogger(__name__)

MIN_REPORT_SECONDS = 0.1
"""Stats go out at most this often."""

LOADING_POLL_SECONDS = 0.05


class Core(Protocol):
    """What the process drives: engine/core.py, or a stand-in in tests. Single-threaded, no I/O, no clock."""

    info: EngineInfo
    wake: Callable[[], None]  # set by who drives it; called from any thread when there is work again
    note: Callable[[list[RequestId]], None]  # likewise; told what is in hand when that grows

    def add(self, submit: Submit, now: float) -> None:
        """Takes a request. What is wrong with it comes as terminal deltas from the next step."""
        ...

    def abort(self, abort: Abort) -> None: ...

    def abort_front_end(self, front_end: int) -> None: ...

    def step(self, pending: Any, now: float) -> tuple[Any, list[Delta]]:
        """Launches the next forward; returns it (None when there is none) and the deltas of the one before."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do something now; a step without work only lets deadlines pass."""
        ...

    def stats(self) -> Stats: ...


BuildCore = Callable[[EngineConfig, Callable[[str, int, int], None]], Core]
"""(config, progress) → Core. Raises errors.StartupError."""


class EngineStart(msgspec.Struct, frozen=True):
    """What the supervisor tells the engine on stdin."""

    config: EngineConfig
    folder: str  # the run folder: holds the socket
    log: logs.LogSettings = logs.LogSettings()
    core: str = "tabstop.engine.build:build_core"  # module:function; tests name their own


class Stop(Exception):
    """Stdin ended."""


class Loading:
    """Builds the core on a thread, so that the loop can answer meanwhile."""

    def __init__(self, start: EngineStart) -> None:
        self._start = start
        self.progress: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self.core: Core | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            module, _, name = self._start.core.partition(":")
            build: BuildCore = getattr(import_module(module), name)
            self.core = build(self._start.config, lambda *what: self.progress.put(Progress(*what)))
        except BaseException as error:
            self.error = error

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def latest(self) -> Progress | None:
        """The newest progress since the last call."""
        newest = None
        while not self.progress.empty():
            newest = self.progress.get()
        return newest


class EngineProcess:
    """The loop. Owns the set of open requests; the core owns everything else about them."""

    def __init__(self, door: Door, bell: Bell, stop: int) -> None:
        """`door` watches the bell and the descriptor `stop`, whose readability means Stop."""
        self.door = door
        self.bell = bell
        self._stop = stop
        self.core: Core | None = None
        self.open: dict[RequestId, set[int]] = {}  # samples that have not ended
        self.draining = False
        self._progress: Progress | None = None
        self._stats = Stats()
        self._reported = 0.0  # when, on time.monotonic()
        self._changed = False  # something happened since
        self._lock = threading.Lock()  # who may use the socket: the loop, and during a step the beacon
        self._ended = threading.Event()

    def load(self, start: EngineStart) -> None:
        """Builds the core while answering clients. Raises what building raised, or Stop."""
        loading = Loading(start)
        while not loading.done:
            self.take(LOADING_POLL_SECONDS)
            self._progress = loading.latest() or self._progress
            self.report()
        if loading.error is not None:
            raise loading.error
        self.core = loading.core
        assert self.core is not None
        garbage.settle()
        self.core.wake = self.bell.ring
        try:
            self.core.note = Recorder(start.folder).note
        except OSError as error:
            log.warning("no room to note which requests are in hand (%s)", error.strerror)
        self.door.broadcast(self.core.info)

    def serve(self) -> None:
        """Runs until Stop; an exception of the core passes through."""
        assert self.core is not None
        threading.Thread(target=self._beacon, name="beacon", daemon=True).start()
        with self._lock:
            try:
                self._loop(self.core)
            finally:
                self._ended.set()

    def _loop(self, core: Core) -> None:
        pending = None
        while True:
            self.take(0.0 if pending is not None or core.has_work() else self._until_report())
            pending, deltas = self._step(core, pending)
            self.deliver(deltas)
            self.report()

    def _step(self, core: Core, pending: Any) -> tuple[Any, list[Delta]]:
        self._changed |= pending is not None or core.has_work()
        self._lock.release()
        try:
            return core.step(pending, time.monotonic())
        finally:
            self._lock.acquire()

    def _until_report(self) -> float:
        """Seconds until Stats are due."""
        interval = MIN_REPORT_SECONDS if self._changed or self.core is None else wire.HEARTBEAT_SECONDS
        return max(0.0, self._reported + interval - time.monotonic())

    def take(self, timeout: float) -> None:
        """Waits for mail and handles all of it. Raises Stop when stdin has ended."""
        readable = self.door.wait(timeout)
        if self._stop in readable:
            raise Stop
        if self.bell.fileno in readable:
            self.bell.silence()
        for letter in self.door.receive():
            self._handle(letter)

    def _handle(self, letter: Letter) -> None:
        now = time.monotonic()
        match letter.message:
            case Submit() as submit:
                self._submit(submit, now)
            case Abort() as abort:
                if abort.request_id in self.open and self.core is not None:
                    self.core.abort(abort)
            case Command() as command:
                self.door.send(letter.sender, self._reply(letter.sender, command, now))

    def _submit(self, submit: Submit, now: float) -> None:
        if submit.request_id in self.open:
            log.warning("dropped a second request with the id %s", submit.request_id)
            return
        self.open[submit.request_id] = set(range(submit.num_samples))
        if self.core is None or self.draining:
            reason = "the engine is draining" if self.draining else "the engine is still loading"
            self.deliver(self._failures(submit.request_id, UnavailableError(reason)))
        else:
            self.core.add(submit, now)

    def _reply(self, sender: int, command: Command, now: float) -> Reply:
        try:
            return Reply(command.command_id, self._command(sender, command, now))
        except TabstopError as error:
            return Reply(command.command_id, failure=EngineFailure(error.code, error.message))

    def _command(self, sender: int, command: Command, now: float) -> Any:
        """The commands that concern clients are here; the others belong to the core."""
        match command.name:
            case wire.JOIN:
                return self._join(sender)
            case "front_end_gone":
                return self._front_end_gone(get_argument(command.arguments, "front_end", int))
            case "drain":
                self.draining = True
                return {"num_open": len(self.open)}
        if self.core is None:
            raise UnavailableError("the engine is still loading")
        return run_command(self.core, command, now)

    def _join(self, client: int) -> None:
        self.door.clients.add(client)
        if self.core is not None:
            self.door.send(client, self.core.info)
        elif self._progress is not None:
            self.door.send(client, self._progress)

    def _front_end_gone(self, client: int) -> None:
        self.door.forget(client)
        if self.core is not None:
            self.core.abort_front_end(client)

    def deliver(self, deltas: list[Delta]) -> None:
        """Sends deltas to their front ends and forgets the samples that they end."""
        for delta in deltas:
            if delta.finish is None or delta.request_id not in self.open:
                continue
            samples = self.open[delta.request_id]
            samples.discard(delta.sample)
            if not samples:
                del self.open[delta.request_id]
        self.door.deliver(deltas)

    def fail_open_requests(self) -> None:
        """Ends every open request with an internal error: the last thing a broken engine does."""
        error = InternalError("the engine failed and stopped; its log tells why")
        for request_id in list(self.open):
            self.deliver(self._failures(request_id, error))
        self.door.linger()

    def _failures(self, request_id: RequestId, error: TabstopError) -> list[Delta]:
        failure = EngineFailure(error.code, error.message)
        return [
            Delta(request_id, sample, [], finish=FinishReason.ERROR, failure=failure)
            for sample in sorted(self.open[request_id])
        ]

    def report(self) -> None:
        """Sends Stats (while loading, progress too) when they are due."""
        if self._until_report() > 0:
            return
        if self.core is None and self._progress is not None:
            self.door.broadcast(self._progress)
        if self.core is not None:
            self._stats = self.core.stats()
        self.door.broadcast(self._stats)
        self._reported, self._changed = time.monotonic(), False

    def _beacon(self) -> None:
        """Repeats the last report while a step takes long: a slow forward is not a dead engine."""
        while not self._ended.wait(wire.HEARTBEAT_SECONDS):
            if not self._lock.acquire(blocking=False):
                continue  # the loop has the socket and reports itself
            try:
                if not self._ended.is_set():
                    self.door.broadcast(self._stats)
            finally:
                self._lock.release()


def run(start: EngineStart, upward: pipes.Upward) -> int:
    """Loads and serves until told to stop; the exit code."""
    bell, stdin = Bell(), sys.stdin.fileno()
    with Door(wire.address(start.folder), bell.fileno, stdin) as door:
        engine = EngineProcess(door, bell, stdin)
        try:
            engine.load(start)
            engine.serve()
        except Stop:
            return EXIT_STOPPED
        except StartupError as error:
            upward.tell(pipes.STARTUP_ERROR, error.message)
            return EXIT_CANNOT_START
        except Exception:
            log.exception("the engine failed")
            engine.fail_open_requests()
        return EXIT_BUG


def main() -> None:
    """`python -m tabstop.engine.process`: reads an EngineStart from stdin and never returns."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor owns signals; it ends stdin when it wants an end
    start = pipes.read_settings(EngineStart)
    logs.configure(start.log, "engine")
    code = run(start, pipes.Upward())
    if code == EXIT_STOPPED:  # the supervisor may be gone, so nobody else would
        shutil.rmtree(start.folder, ignore_errors=True)
    logging.shutdown()
    build.interrupt()
    os._exit(code)  # a model may still be loading on its thread; nothing is left to clean up


if __name__ == "__main__":
    main()
