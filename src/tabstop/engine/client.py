"""The narrow waist between text and tokens: three verbs over plain data.

`ProcessClient` (engine/process_client.py) talks to an engine process, `InprocClient` (engine/inproc.py) steps a core in
this process, `FakeEngine` (engine/fake.py) needs no model; the service and the tests cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from tabstop.types import Delta, EngineInfo, FinishReason, RequestId, Stats, Submit


class EngineClient(Protocol):
    """Driven from one event loop. Raises errors.EngineDeadError from every verb once the engine is gone."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> Stats:
        """The newest report of the engine."""
        ...

    @property
    def num_unreported(self) -> int:
        """Requests of this client that are open and that `stats` cannot have counted yet."""
        ...

    def new_request_id(self) -> RequestId: ...

    def submit(self, submit: Submit) -> AsyncIterator[Delta]:
        """Sends the request at once (not at the first iteration) and yields its deltas in order.

        Ends after the terminal delta of every sample. When the reader is behind, waiting deltas of one sample may come
        merged. Closing the iterator early aborts the request. A dead engine shows as one terminal delta a sample whose
        failure has code "engine_dead".
        """
        ...

    def abort(
        self, request_id: RequestId, samples: tuple[int, ...] | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        """Ends the request's unfinished samples; their terminal deltas still arrive. Unknown ids are ignored."""
        ...

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Runs a registered engine command (warm, drain, …) and returns its result."""
        ...
