"""Server-sent events from bytes, however the network cuts them. Knows no JSON.

Follows the WHATWG rules: lines end in LF, CRLF or CR; comments start with a colon; one space after the colon of a field
is dropped; several data lines join with LF; a blank line ends the event.
"""

from __future__ import annotations

from collections.abc import Iterator


class EventParser:
    """Feed bytes, get the data of each finished event. An unfinished tail stays inside (`has_tail`)."""

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []
        self._after_cr = False

    @property
    def has_tail(self) -> bool:
        """True if the stream stopped inside an event."""
        return bool(self._tail.strip()) or bool(self._data)

    def feed(self, received: bytes) -> Iterator[bytes]:
        for line in self._lines(received):
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data = []
            elif line.startswith(b"data"):
                name, _, value = line.partition(b":")
                if name == b"data":
                    self._data.append(value[1:] if value.startswith(b" ") else value)

    def _lines(self, received: bytes) -> list[bytes]:
        if self._after_cr and received.startswith(b"\n"):
            received, self._after_cr = received[1:], False  # the LF of a CRLF that was cut in two
        if received:
            self._after_cr = received.endswith(b"\r")
        text = self._tail + received
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = text.split(b"\n")
        return lines
