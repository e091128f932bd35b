"""EngineClient over a socket to an engine process, for one front end (or the supervisor).

Knows frames, request numbers and when an engine counts as dead: told so by the supervisor (`fail`), or silent for too
long. One task receives and puts deltas into per-request streams, so a slow reader never delays another.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tabstop import errors
from tabstop.engine import wire
from tabstop.engine.delivery import DeltaStream
from tabstop.errors import EngineDeadError, PayloadTooLargeError, UnavailableError
from tabstop.types import (
    Abort,
    Command,
    EngineFailure,
    EngineInfo,
    FinishReason,
    Outputs,
    Progress,
    Reply,
    RequestId,
    Stats,
    Submit,
    ToEngine,
)

log = logging.getLogger(__name__)


class ProcessClient:
    """Make it inside a running event loop, `await ready()`, use it, `await close()`."""

    def __init__(
        self,
        address: str,
        number: int,
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        silence_limit: float = wire.SILENCE_LIMIT_SECONDS,
    ) -> None:
        """`number` is this client's own for ever: a restarted front end gets another.

        `silence_limit`: seconds after which an engine that says nothing counts as dead.
        """
        self.number = number
        self.death: str | None = None  # why the engine is gone
        self.stats = Stats()
        self._info: EngineInfo | None = None
        self._on_progress = on_progress
        self._streams: dict[RequestId, DeltaStream] = {}
        self._unreported: set[RequestId] = set()  # of them, those sent after the newest Stats
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._request_counter = itertools.count()
        self._command_counter = itertools.count()
        self._changed = asyncio.Event()  # there is an EngineInfo, or a death
        self._dead = asyncio.Event()
        self._silence_limit = silence_limit
        self._silence = 0.0  # seconds without a frame, counted while this process ran
        self._context = zmq.asyncio.Context()
        self._socket = self._connect(address)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._listen_for_silence())]
        self._send(Command(next(self._command_counter), wire.JOIN))

    def _connect(self, address: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, wire.identity(self.number))
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 20)  # ms; the engine may bind after we connect
        socket.connect(address)
        return socket

    # ---- EngineClient

    @property
    def info(self) -> EngineInfo:
        """What the engine can do. Raises UnavailableError until it has loaded."""
        self._check_alive()
        if self._info is None:
            raise UnavailableError("the model is still loading; try again in a moment", retry_after=1)
        return self._info

    @property
    def num_unreported(self) -> int:
        return len(self._unreported)

    def new_request_id(self) -> RequestId:
        return self.number, next(self._request_counter)

    def submit(self, submit: Submit) -> DeltaStream:
        """Sends the request and returns its deltas. Raises EngineDeadError; see EngineClient.submit."""
        self._check_alive()
        stream = DeltaStream(submit.request_id, submit.num_samples, self._leave)
        frame = wire.encode(submit)
        if len(frame) > wire.MAX_FRAME_BYTES:
            stream.fail(_failure(PayloadTooLargeError(f"the request is over {wire.MAX_FRAME_BYTES} bytes")))
            return stream
        self._streams[submit.request_id] = stream
        self._unreported.add(submit.request_id)
        self._send_frame(frame)
        return stream

    def abort(
        self, request_id: RequestId, samples: tuple[int, ...] | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        self._check_alive()
        if request_id in self._streams:
            self._send(Abort(request_id, samples, reason))

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Raises the engine's refusal as its errors.TabstopError, EngineDeadError when it dies meanwhile."""
        self._check_alive()
        command = Command(next(self._command_counter), name, arguments or {})
        reply = self._replies[command.command_id] = asyncio.get_running_loop().create_future()
        self._send(command)
        try:
            return await reply
        finally:
            del self._replies[command.command_id]

    # ---- the engine's life

    async def ready(self) -> EngineInfo:
        """Waits until the engine can serve. Raises EngineDeadError."""
        await self._changed.wait()
        return self.info

    async def wait_dead(self) -> str:
        """Waits until the engine is gone; the reason."""
        await self._dead.wait()
        assert self.death is not None
        return self.death

    def fail(self, reason: str) -> None:
        """The engine is gone: ends every open stream with an error and refuses new ones. The first reason stays."""
        if self.death is not None:
            return
        self.death = reason
        self._changed.set()
        self._dead.set()
        error = EngineDeadError(reason)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(_failure(error))
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)

    async def close(self) -> None:
        """Leaves. Open streams end with an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.fail("the client was closed")
        self._socket.close()
        self._context.term()

    @property
    def num_open(self) -> int:
        """Requests whose last delta has not arrived."""
        return len(self._streams)

    def _check_alive(self) -> None:
        if self.death is not None:
            raise EngineDeadError(self.death)

    # ---- frames

    def _leave(self, stream: DeltaStream) -> None:
        """A reader closed its stream early."""
        self._unreported.discard(stream.request_id)
        if self._streams.pop(stream.request_id, None) is not None and self.death is None:
            self._send(Abort(stream.request_id))

    def _send(self, message: ToEngine) -> None:
        self._send_frame(wire.encode(message))

    def _send_frame(self, frame: bytes) -> None:
        self._socket.send(frame)  # without a high-water mark this queues at once; the future has nothing to tell

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            self._silence = 0.0
            try:
                message = wire.decode_from_engine(frame)
            except msgspec.DecodeError as error:
                log.error("dropped a bad frame from the engine: %s", error)
                continue
            self._take(message)

    def _take(self, message: Outputs | Reply | Stats | EngineInfo | Progress) -> None:
        match message:
            case Outputs():
                self._deliver(message)
            case Stats():
                if message != self.stats:  # the beacon repeats the last one while a step takes long
                    self._unreported.clear()
                self.stats = message
            case EngineInfo():
                self._info = message
                self._changed.set()
            case Progress():
                self._on_progress(message)
            case Reply():
                self._settle(message)

    def _deliver(self, outputs: Outputs) -> None:
        for delta in outputs.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # closed early; the engine had not heard of it yet
            stream.put(delta)
            if not stream.open_samples:
                del self._streams[delta.request_id]
                self._unreported.discard(delta.request_id)

    def _settle(self, reply: Reply) -> None:
        waiter = self._replies.get(reply.command_id)
        if waiter is None or waiter.done():
            return
        if reply.failure is not None:
            waiter.set_exception(errors.from_code(reply.failure.code, reply.failure.message))
        else:
            waiter.set_result(reply.result)

    async def _listen_for_silence(self) -> None:
        while self.death is None:
            await asyncio.sleep(wire.HEARTBEAT_SECONDS)
            self._silence += wire.HEARTBEAT_SECONDS
            if self._silence > self._silence_limit and self.death is None:
                log.error("no sign of life from the engine for %.0f s", self._silence)
                self.fail("the engine stopped responding")


def _failure(error: errors.TabstopError) -> EngineFailure:
    return EngineFailure(error.code, error.message)
