"""HTTP: one file a dialect (dialects/), and what all of them share.

A dialect is a list of Routes: where a client asks, what it sends, and how that is answered. Most generate: a pure
function makes a Call of the body, and a pure ReplyFormat makes bytes of what comes of it (endpoints.py). app.py puts
them on one application and knows none by name; edge.py stands in front of all. Imports no torch, knows no tokens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tabstop.keys import INFER

if TYPE_CHECKING:
    import msgspec
    from starlette.requests import Request
    from starlette.responses import Response

    from tabstop.call import TextDelta, Usage
    from tabstop.errors import TabstopError
    from tabstop.service import Service


class ReplyFormat(Protocol):
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


Endpoint = Callable[["Service", "Request", Any], Awaitable["Response"]]
"""What answers at a route, given its body (None where it takes none). Raises TabstopError before anything is sent."""

ErrorForm = Callable[["TabstopError"], Any]
"""The JSON object that tells of an error before anything is sent."""


@dataclass(frozen=True, slots=True)
class Route:
    """A path and what is there."""

    method: str
    path: str
    summary: str
    endpoint: Endpoint
    body: type[msgspec.Struct] | None = None  # what is sent there, decoded (schema.py); its name and doc are public
    is_versioned: bool = True  # also under /v1
    scope: str | None = INFER  # that a key must have; None: any key will do
    error_form: ErrorForm | None = None  # also of errors at the edge; None: OpenAI's
