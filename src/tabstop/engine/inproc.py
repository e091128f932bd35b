"""An engine core in this process: a thread steps it, callers stream from it. For offline use and tests.

The same three verbs as the server's ProcessClient; no sockets, no second process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from tabstop.engine.commands import run_command
from tabstop.engine.core import EngineCore
from tabstop.engine.delivery import DeltaStream
from tabstop.errors import EngineDeadError, TabstopError
from tabstop.types import (
    Abort,
    Command,
    Delta,
    EngineFailure,
    EngineInfo,
    FinishReason,
    RequestId,
    Stats,
    Submit,
)

log = logging.getLogger(__name__)


class InprocClient:
    """An EngineClient over a core that a daemon thread steps while it has work, and that sleeps otherwise."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        core.wake = self._wake
        self._counter = itertools.count()
        self._inbox: list[Callable[[], object]] = []  # to run on the engine's thread
        self._streams: dict[RequestId, tuple[asyncio.AbstractEventLoop, DeltaStream]] = {}  # those not left or ended
        self._replies: set[Future[Any]] = set()  # of commands not answered yet
        self._changed = threading.Condition()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        self._check_alive()
        return self.core.info

    @property
    def stats(self) -> Stats:
        return self.core.stats()

    @property
    def num_unreported(self) -> int:
        return 0

    def new_request_id(self) -> RequestId:
        return (0, next(self._counter))

    def submit(self, submit: Submit) -> AsyncIterator[Delta]:
        stream = DeltaStream(submit.request_id, submit.num_samples, self._leave)
        self._streams[submit.request_id] = (asyncio.get_running_loop(), stream)
        try:
            self._post(lambda: self.core.add(submit, time.monotonic()))
        except EngineDeadError:
            del self._streams[submit.request_id]
            raise
        return stream

    def _leave(self, stream: DeltaStream) -> None:
        """A reader closed its stream early."""
        self._streams.pop(stream.request_id, None)
        with contextlib.suppress(EngineDeadError):  # and with it the request
            self.abort(stream.request_id)

    def abort(
        self, request_id: RequestId, samples: tuple[int, ...] | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        self._post(partial(self.core.abort, Abort(request_id, samples, reason)))

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        reply: Future[Any] = Future()
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)
        self._post(partial(self._run_command, Command(0, name, arguments or {}), reply))
        return await asyncio.wrap_future(reply)

    def close(self) -> None:
        """Ends open requests and stops the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self.core.close()

    def _post(self, action: Callable[[], object]) -> None:
        with self._changed:
            self._check_alive()
            self._inbox.append(action)
            self._changed.notify()

    def _check_alive(self) -> None:
        if self._is_closed or self._failure:
            raise EngineDeadError("the engine of this process has stopped") from self._failure

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- the engine's thread

    def _run(self) -> None:
        message = "the engine was closed"
        try:
            self._loop()
        except Exception as error:  # every waiter must hear of it
            log.exception("the engine failed")
            self._failure, message = error, f"the engine failed: {type(error).__name__}"
        finally:
            self._fail_all(message)

    def _loop(self) -> None:
        pending = None
        while not self._is_closed:
            with self._changed:
                while not (self._inbox or self._is_closed or pending or self.core.has_work()):
                    self._changed.wait()
                inbox, self._inbox = self._inbox, []
            for action in inbox:
                action()
            pending, deltas = self.core.step(pending, time.monotonic())
            self._deliver(deltas)
        if pending:
            pending.wait()

    def _run_command(self, command: Command, reply: Future[Any]) -> None:
        if not reply.set_running_or_notify_cancel():
            return  # nobody waits any more
        try:
            reply.set_result(run_command(self.core, command, time.monotonic()))
        except Exception as error:
            reply.set_exception(error)
            if not isinstance(error, TabstopError):
                raise  # our bug: the engine's state is unknown

    def _deliver(self, deltas: list[Delta]) -> None:
        by_request: dict[RequestId, list[Delta]] = {}
        for delta in deltas:
            by_request.setdefault(delta.request_id, []).append(delta)
        for request_id, own in by_request.items():
            if entry := self._streams.get(request_id):  # not left, and not a command's own request
                loop, stream = entry
                _call(loop, self._put, stream, own)

    def _put(self, stream: DeltaStream, deltas: list[Delta]) -> None:
        """On the reader's loop."""
        for delta in deltas:
            stream.put(delta)
        if not stream.open_samples:
            self._streams.pop(stream.request_id, None)

    def _fail_all(self, message: str) -> None:
        with self._changed:  # from now on nothing is posted; what was, never runs
            self._is_closed, self._inbox = True, []
        failure = EngineFailure(EngineDeadError.code, message)
        for loop, stream in list(self._streams.values()):
            _call(loop, stream.fail, failure)
        for reply in list(self._replies):
            if reply.set_running_or_notify_cancel():
                reply.set_exception(EngineDeadError(message))


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    """Runs a function on a reader's loop, if that still exists."""
    with contextlib.suppress(RuntimeError):  # closed: nobody reads any more
        loop.call_soon_threadsafe(function, *arguments)
