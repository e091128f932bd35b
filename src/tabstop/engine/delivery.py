"""Hands the deltas of a request to whoever reads it: never blocks, merges what waits, ends exactly once.

Shared by the clients (engine/client.py): they put deltas in, the service iterates. Knows no socket and no engine. All
calls come from one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tabstop.types import Delta, EngineFailure, FinishReason, RequestId


def merge(waiting: Delta, later: Delta) -> None:
    """Appends to a delta that nobody has read yet the next one of the same sample."""
    assert waiting.finish is None, "a sample ended twice"
    waiting.token_ids += later.token_ids
    waiting.logprobs += later.logprobs
    waiting.prompt_logprobs += later.prompt_logprobs
    waiting.finish = later.finish
    waiting.stop_token_id = later.stop_token_id
    waiting.num_cached_tokens = later.num_cached_tokens
    waiting.failure = later.failure


class DeltaStream:
    """The answer to one request, as an async iterator. Its memory is bounded by the request's tokens."""

    def __init__(self, request_id: RequestId, num_samples: int, on_close: Callable[[DeltaStream], None]) -> None:
        """`on_close` is called once when the reader leaves before the last sample's end."""
        self.request_id = request_id
        self.open_samples = set(range(num_samples))  # those whose terminal delta has not arrived
        self._waiting: dict[int, Delta] = {}  # by sample, in the order in which they began to wait
        self._on_close = on_close
        self._closed = False
        self._arrived = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Takes a delta from the engine; those of ended samples and closed streams are ignored."""
        if self._closed or delta.sample not in self.open_samples:
            return
        if delta.finish is not None:
            self.open_samples.discard(delta.sample)
        if delta.sample in self._waiting:
            merge(self._waiting[delta.sample], delta)
        else:
            self._waiting[delta.sample] = delta
        self._arrived.set()

    def fail(self, failure: EngineFailure) -> None:
        """Ends every open sample with an error."""
        for sample in sorted(self.open_samples):
            self.put(Delta(self.request_id, sample, [], finish=FinishReason.ERROR, failure=failure))

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._waiting:
            if self._closed or not self.open_samples:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.pop(next(iter(self._waiting)))

    async def aclose(self) -> None:
        """Leaves the stream; what has not ended is aborted."""
        if not self._closed:
            self._closed = True
            self._waiting.clear()
            self._arrived.set()
            if self.open_samples:
                self._on_close(self)
