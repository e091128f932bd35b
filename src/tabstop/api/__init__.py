"""HTTP: one file a dialect, each two pure directions (JSON body → Call, text delta → bytes), and what all share.

The contract of a dialect is the `Format` below. app.py joins dialects to paths; reply.py runs a Call and writes what a
Format makes of its deltas; edge.py stands in front of every route. Imports no torch, knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tabstop.call import TextDelta, Usage
    from tabstop.errors import TabstopError


class Format(Protocol):
    """How one answer looks on the wire. Pure: bytes out of deltas; made anew for each request."""

    media_type: str
    """Of the stream; a whole answer is application/json."""

    def opening(self) -> bytes:
        """What a stream begins with, before any delta; may be empty."""
        ...

    def delta(self, delta: TextDelta) -> bytes:
        """The events of one delta."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """What a complete stream ends with."""
        ...

    def failure(self, error: TabstopError) -> bytes:
        """What a stream ends with that failed after it began."""
        ...

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        """The JSON body of an answer that is not streamed; the deltas are merged, one a choice, in order."""
        ...
