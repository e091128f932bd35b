"""Runs a Call and writes its answer, streamed or whole, in the form that a dialect gives (api.ReplyFormat).

The first news from the engine is awaited before the response begins, so that errors have their own status. A client
that goes away is noticed at once, whatever is being waited for, and everything of its request is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tabstop.answer import Answer
from tabstop.api import ReplyFormat
from tabstop.call import Call, TextDelta, best_choices
from tabstop.errors import TabstopError
from tabstop.service import Service
from tabstop.types import FinishReason


class Reply(Response):
    """Raises TabstopError, when called by the server, if the answer fails before anything was sent."""

    def __init__(self, service: Service, call: Call, form: ReplyFormat, *, stream: bool) -> None:
        self.background = None
        self._service = service
        self._call = call
        self._format = form
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._answer(send))

    async def _answer(self, send: Send) -> None:
        answer = await self._service.start(self._call)
        try:
            await (self._send_stream if self._stream else self._send_whole)(answer, send)
        finally:
            await answer.close()

    async def _send_stream(self, answer: Answer, send: Send) -> None:
        form = self._format
        headers = [(b"content-type", form.media_type.encode()), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # proxies shall not collect events
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        begin = form.opening()
        try:
            while deltas := await answer.next_deltas():
                events = begin + b"".join(map(form.delta, deltas))
                begin = b""
                await send({"type": "http.response.body", "body": events, "more_body": True})
            end = form.closing(answer.usage)
        except TabstopError as error:
            end = form.failure(error)
        await answer.close()
        await send({"type": "http.response.body", "body": begin + end})

    async def _send_whole(self, answer: Answer, send: Send) -> None:
        choices: dict[int, TextDelta] = {}
        while deltas := await answer.next_deltas():
            for delta in deltas:
                if delta.index in choices:
                    choices[delta.index].append(delta)
                else:
                    choices[delta.index] = delta
        await answer.close()
        ordered = best_choices([choices[index] for index in sorted(choices)], self._call)
        if self._call.min_confidence is not None:
            ordered = without_guesses(ordered, self._call.min_confidence)
        if self._call.distinct:
            ordered = distinct(ordered)
        body = self._format.whole(ordered, answer.usage)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def without_guesses(choices: list[TextDelta], min_confidence: float) -> list[TextDelta]:
    """Choices whose tokens had a lower mean log-probability lose their text and all that would tell it."""
    return [
        replace(choice, text="", reasoning="", token_ids=[], logprobs=[], finish=FinishReason.STOP, stop_reason=None)
        if choice.confidence is not None and choice.confidence.mean < min_confidence
        else choice
        for choice in choices
    ]


def distinct(choices: list[TextDelta]) -> list[TextDelta]:
    """The first of all choices whose texts differ in blanks only, numbered anew."""
    first: dict[str, TextDelta] = {}
    for choice in choices:
        first.setdefault(" ".join(choice.text.split()), choice)
    return [replace(choice, index=index) for index, choice in enumerate(first.values())]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end, or cancels it the moment the client disconnects. Raises what `work` raises.

    The request's body must have been read: the next thing to receive is then the disconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))
    if not working.cancelled():
        working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
