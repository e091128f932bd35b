"""What most routes do with a body: generate an answer, or say something of the model that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tabstop.api import Endpoint, ReplyFormat
from tabstop.api.fields import Caller
from tabstop.api.reply import Reply
from tabstop.call import Call
from tabstop.service import ServedModel, Service
from tabstop.types import Priority


def caller_of(request: Request) -> Caller:
    """As the edge found it."""
    state: Mapping[str, Any] = request.scope["state"]
    key = state["key"]
    best = Priority.INTERACTIVE if key is None else key.priority
    return Caller(state["request_id"], state["tenant"], request.headers, best, state.get("spend_tokens"))


@dataclass(frozen=True, slots=True)
class Generating:
    """An Endpoint that runs the call of a schema.Generation."""

    make_call: Callable[[Any, Caller], Call]
    make_format: Callable[[Any, Call, ServedModel, str], ReplyFormat]
    """Of the body, its call, the model, and what the answer calls that."""

    async def __call__(self, service: Service, request: Request, body: Any) -> Response:
        call = self.make_call(body, caller_of(request))
        form = self.make_format(body, call, service.resolve(call.model), service.shown_name(call.model))
        return Reply(service, call, form, stream=bool(body.stream))


def of_model(tell: Callable[[Any, ServedModel], Any]) -> Endpoint:
    """JSON of a body and the model that it names; slow, so in a thread."""

    async def endpoint(service: Service, request: Request, body: Any) -> Response:
        return json_response(await asyncio.to_thread(tell, body, service.resolve(body.model or "")))

    return endpoint


def json_response(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
