"""An engine core in this process: a thread steps it, callers stream from it. For offline use and tests.

The same three verbs as the server's ProcessClient; no sockets, no second process.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from tabstop.engine.core import EngineCore
from tabstop.errors import EngineDeadError, InputError
from tabstop.types import Abort, Delta, EngineFailure, EngineInfo, FinishReason, RequestId, Stats, Submit

Listener = Callable[[Delta], object]


class InprocClient:
    """An EngineClient over a core that a daemon thread steps while it has work, and that sleeps otherwise."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        core.wake = self._wake
        self._counter = itertools.count()
        self._inbox: list[tuple[Submit, Listener] | Abort] = []
        self._listeners: dict[RequestId, tuple[Listener, int]] = {}  # and how many samples have not ended
        self._changed = threading.Condition()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    @property
    def stats(self) -> Stats:
        return self.core.stats()

    def new_request_id(self) -> RequestId:
        return (0, next(self._counter))

    def submit(self, submit: Submit) -> AsyncIterator[Delta]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Delta]()
        self._send((submit, lambda delta: loop.call_soon_threadsafe(queue.put_nowait, delta)))
        return self._stream(submit, queue)

    async def _stream(self, submit: Submit, queue: asyncio.Queue[Delta]) -> AsyncIterator[Delta]:
        num_left = submit.num_samples
        try:
            while num_left:
                delta = await queue.get()
                num_left -= delta.finish is not None
                yield delta
        finally:
            if num_left:
                self.abort(submit.request_id)

    def abort(
        self, request_id: RequestId, samples: tuple[int, ...] | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        if not self._is_closed and not self._failure:
            self._send(Abort(request_id, samples, reason))

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        raise InputError(f"an engine in this process takes no commands; {name!r} is for the server")

    def close(self) -> None:
        """Ends open requests and stops the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self.core.close()

    def _send(self, message: tuple[Submit, Listener] | Abort) -> None:
        with self._changed:
            if self._is_closed or self._failure:
                raise EngineDeadError("the engine of this process has stopped") from self._failure
            self._inbox.append(message)
            self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # the thread's last word: every waiter must hear of it
            self._failure = error
            self._fail_all("the engine failed: " + type(error).__name__)
            raise
        self._fail_all("the engine was closed")

    def _loop(self) -> None:
        pending = None
        while True:
            with self._changed:
                while not (self._inbox or self._is_closed or pending or self.core.has_work()):
                    self._changed.wait()
                if self._is_closed:
                    break
                inbox, self._inbox = self._inbox, []
            for message in inbox:
                self._handle(message)
            pending, deltas = self.core.step(pending, time.monotonic())
            self._deliver(deltas)
        if pending:
            pending.wait()

    def _handle(self, message: tuple[Submit, Listener] | Abort) -> None:
        if isinstance(message, Abort):
            self.core.abort(message)
        else:
            submit, listener = message
            self._listeners[submit.request_id] = (listener, submit.num_samples)
            self.core.add(submit, time.monotonic())

    def _deliver(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            listener, num_left = self._listeners[delta.request_id]
            num_left -= delta.finish is not None
            if num_left:
                self._listeners[delta.request_id] = (listener, num_left)
            else:
                del self._listeners[delta.request_id]
            listener(delta)

    def _fail_all(self, message: str) -> None:
        with self._changed:
            submits = [entry for entry in self._inbox if not isinstance(entry, Abort)]
            self._inbox = []
        for submit, listener in submits:
            self._listeners[submit.request_id] = (listener, submit.num_samples)
        for request_id, (listener, num_left) in self._listeners.items():
            for sample in range(num_left):
                failure = EngineFailure(EngineDeadError.code, message)
                listener(Delta(request_id, sample, [], FinishReason.ERROR, failure=failure))
        self._listeners.clear()
