"""The engine's end of the socket: which clients are there, frames in, frames out.

Knows who may say what (a client only speaks for its own requests); knows nothing of scheduling. A bad frame is counted
and dropped: nothing that arrives can stop the engine. Sending never blocks: a client that does not read costs memory
for the requests it has open, and no more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import msgspec
import zmq

from tabstop.engine import wire
from tabstop.types import Command, Delta, FromEngine, Outputs, Submit, ToEngine

log = logging.getLogger(__name__)

LINGER_MILLISECONDS = 1000
"""How long the last messages (why the engine ends) may take to leave."""


class Letter(NamedTuple):
    """A message and the number of the client that sent it."""

    sender: int
    message: ToEngine


class Bell:
    """Wakes the loop from another thread: a pipe, because the loop sleeps on file descriptors."""

    def __init__(self) -> None:
        self.fileno, self._ring = os.pipe()
        os.set_blocking(self.fileno, False)
        os.set_blocking(self._ring, False)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it rings already
            os.write(self._ring, b".")

    def silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self.fileno, 1 << 16)

    def close(self) -> None:
        os.close(self.fileno)
        os.close(self._ring)


class Door:
    """A bound ROUTER socket and the clients that joined through it."""

    def __init__(self, address: str, *watched: int) -> None:
        """Binds `address`; `watched` are file descriptors that end a wait when they become readable."""
        self.clients: set[int] = set()
        self.gone: set[int] = set()  # numbers are never used twice: what still arrives from these is late
        self.num_bad_frames = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        for descriptor in watched:
            self._poller.register(descriptor, zmq.POLLIN)

    def __enter__(self) -> Door:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    def linger(self) -> None:
        """Lets what was sent leave before the socket closes; otherwise closing drops it."""
        self._socket.setsockopt(zmq.LINGER, LINGER_MILLISECONDS)

    def wait(self, timeout: float) -> set[int]:
        """Sleeps until there is a frame or a watched descriptor is readable, at most `timeout` seconds; the latter."""
        return {source for source, _ in self._poller.poll(math.ceil(timeout * 1000)) if isinstance(source, int)}

    def receive(self) -> Iterator[Letter]:
        """Every message that has arrived, without waiting."""
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            letter = self._open(frames)
            if letter is not None and letter.sender not in self.gone:
                yield letter

    def _open(self, frames: list[bytes]) -> Letter | None:
        try:
            sender_id, frame = frames
            sender, message = int(sender_id), wire.decode_to_engine(frame)
        except (ValueError, msgspec.DecodeError) as error:
            return self._drop(str(error))
        if not isinstance(message, Command) and message.request_id[0] != sender:
            return self._drop(f"client {sender} spoke for a request of client {message.request_id[0]}")
        if isinstance(message, Submit) and (message.num_samples < 1 or len(message.prompt_ids) % 4):
            return self._drop("a request without samples, or with prompt ids that are not uint32")
        return Letter(sender, message)

    def _drop(self, reason: str) -> Letter | None:
        self.num_bad_frames += 1
        log.warning("dropped a bad frame: %s", reason)
        return None

    def forget(self, client: int) -> None:
        """Takes nothing more from a client that is gone, and sends it nothing more."""
        self.clients.discard(client)
        self.gone.add(client)

    def send(self, client: int, message: FromEngine) -> None:
        """Queues a message; one for a client that is not connected is dropped."""
        self._socket.send_multipart([wire.identity(client), wire.encode(message)], zmq.NOBLOCK)

    def broadcast(self, message: FromEngine) -> None:
        """To every client that joined."""
        frame = wire.encode(message)
        for client in self.clients:
            self._socket.send_multipart([wire.identity(client), frame], zmq.NOBLOCK)

    def deliver(self, deltas: list[Delta]) -> None:
        """One Outputs message a client, its deltas in order."""
        by_client: dict[int, list[Delta]] = defaultdict(list)
        for delta in deltas:
            by_client[delta.request_id[0]].append(delta)
        for client, own in by_client.items():
            if client not in self.gone:
                self.send(client, Outputs(own))
