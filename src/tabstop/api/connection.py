"""One connection: uvicorn's HTTP/1.1, and what a client may take of time and memory before and after a request is read.

A head must arrive within `header_timeout` and `max_header_bytes`, a body that nobody waits for within the former, and
who does not read an answer for `send_timeout` is cut. Bodies that are waited for are body.py's business. Without these
a client could hold a connection, its descriptor and its buffers for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tabstop.api.errors import error_object
from tabstop.config import ServerConfig
from tabstop.errors import HeaderTooLargeError, InputError, OverloadedError, RequestTimeoutError, TabstopError


class Timer:
    """Calls a function once, some seconds after it was started first; may be stopped."""

    def __init__(self, seconds: float, on_time: Callable[[], None]) -> None:
        self._seconds, self._on_time = seconds, on_time
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Nothing when it runs already: a drop of bytes wins no time."""
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._seconds, self._ring)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def close(self) -> None:
        """Stops for good and forgets whom to call, or the two would keep each other for the garbage collector."""
        self.stop()
        self._on_time = _nothing

    def _ring(self) -> None:
        self._handle = None
        self._on_time()


def _nothing() -> None:
    pass


class Connection(HttpToolsProtocol):
    """uvicorn makes one for each connection, by keyword; `limits` is ours."""

    def __init__(self, *arguments: Any, limits: ServerConfig, peers: Counter[str], **keywords: Any) -> None:
        """`peers`: connections by address, of all of this front end."""
        super().__init__(*arguments, **keywords)
        self._limits = limits
        self._peers = peers
        self._address = ""
        self._head_timer = Timer(limits.header_timeout, self._head_is_late)
        self._send_timer = Timer(limits.send_timeout, self._abort)
        self._num_head_bytes = 0  # at least so many, of the head that is being read
        self._began_now = False  # with the newest piece of data
        self._in_head = False  # a request has begun, its headers have not ended
        self._in_message = False  # a request has begun, its body has not ended

    # ---- the connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._address = self.client[0] if self.client else ""
        self._peers[self._address] += 1
        most = self._limits.max_connections_per_address
        if most is not None and self._peers[self._address] > most:
            message = f"this address has {most} connections already; close one, or raise --max-connections-per-address"
            self._refuse(OverloadedError(message, retry_after=1))
        self._head_timer.start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.close()
        self._send_timer.close()
        self._peers[self._address] -= 1
        if not self._peers[self._address]:
            del self._peers[self._address]
        self._unset_keepalive_if_required()  # uvicorn leaves it running after an error
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._began_now = False
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and not self._began_now:  # what else lies in the piece where it began is not ours to count
            self._num_head_bytes += len(data)
        if self._num_head_bytes > self._limits.max_header_bytes:
            self._refuse(self._too_large())
        elif not self._is_idle:
            self._head_timer.stop()
        elif self._in_message:
            self._head_timer.start()
        elif self.cycle is not None and self.timeout_keep_alive_task is None:
            self._head_timer.stop()  # the body of a refused request has ended: as after an answer
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @property
    def _is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _head_is_late(self) -> None:
        seconds = self._limits.header_timeout
        if self._in_head:
            self._refuse(RequestTimeoutError(f"the headers did not arrive within {seconds:g} seconds"))
        else:
            self._abort()

    def _abort(self) -> None:
        """Without waiting for a client that does not read."""
        self.transport.abort()

    def _refuse(self, error: TabstopError) -> None:
        """Answers by itself and closes. Nothing when an answer is under way: its end is the client's business."""
        if self._is_idle and not self.transport.is_closing():
            body = msgspec.json.encode(error_object(error))
            status = HTTPStatus(error.status)
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            if error.retry_after is not None:
                head += f"retry-after: {error.retry_after}\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
        self._send_timer.start()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InputError("this is no HTTP/1.1 request"))

    def _too_large(self) -> HeaderTooLargeError:
        size, count = self._limits.max_header_bytes, self._limits.max_num_headers
        message = f"the headers are over {size} bytes, or more than {count}; send less, or raise --max-header-bytes"
        return HeaderTooLargeError(f"{message}, --max-num-headers")

    # ---- reading

    def on_message_begin(self) -> None:
        self._in_head = self._in_message = self._began_now = True
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._num_head_bytes = False, 0
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > self._limits.max_header_bytes or len(self.headers) > self._limits.max_num_headers:
            self._refuse(self._too_large())
        elif any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            self._refuse(InputError("a body may be chunked, and nothing else"))  # its end would be anybody's guess
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        if not self.transport.is_closing():
            super().on_message_complete()

    # ---- writing

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._send_timer.start()  # the rest must be taken before it closes
        elif self._in_head and self._is_idle:  # the next request has begun meanwhile
            self._head_timer.start()

    def timeout_keep_alive_handler(self) -> None:
        self._abort()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._send_timer.start()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._send_timer.stop()
