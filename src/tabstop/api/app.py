"""Joins paths to dialects: the FastAPI application of one front end.

Every path is there with and without /v1. Bodies are decoded by msgspec (schema.py), so /openapi.json is told of their
schemas here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tabstop import __version__
from tabstop.api.body import read_body
from tabstop.api.ceilings import Ceilings
from tabstop.api.edge import Edge, Guard
from tabstop.api.errors import error_response, routing_response
from tabstop.api.llamacpp import (
    LlamaFormat,
    apply_template,
    infill_call,
    llama_completion_call,
    props,
    slots,
)
from tabstop.api.logprobs import PromptShown
from tabstop.api.metrics import CONTENT_TYPE, Metrics
from tabstop.api.mistral import FimFormat, fim_call
from tabstop.api.openai import Caller, ChatFormat, CompletionFormat, chat_call, completion_call
from tabstop.api.reply import Reply
from tabstop.api.schema import (
    BODIES,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    InfillBody,
    LlamaBody,
    LlamaCompletionBody,
    MistralBody,
    TemplateBody,
    TokenizeBody,
    decode_body,
)
from tabstop.api.state import ServerState
from tabstop.api.tokens import detokenize, tokenize
from tabstop.call import Call
from tabstop.config import ServerConfig
from tabstop.errors import ForbiddenError, TabstopError, UnknownModelError
from tabstop.keys import ADMIN, INFER
from tabstop.service import ServedModel, Service
from tabstop.types import Priority

Endpoint = Callable[[Request], Awaitable[Response]]

SCHEMAS = "#/components/schemas/"


def build_app(service: Service, config: ServerConfig, state: ServerState | None = None) -> FastAPI:
    """The application. `state` None: ready at once (tests, other hosts); server.py passes one that it changes."""
    metrics = Metrics(service)
    service.observer = metrics
    app = FastAPI(
        title="Tabstop", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    state = state or ServerState()
    endpoints = Endpoints(service, config, state, metrics)
    for route in endpoints.routes():
        for path in (f"/v1{route.path}", route.path) if route.is_versioned else (route.path,):
            app.add_api_route(
                path,
                _scoped(route.scope, route.endpoint),
                methods=[route.method],
                response_model=None,
                summary=route.summary,
                openapi_extra=_request_body(route.body),
                operation_id=f"{route.method} {path}",
            )
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    document.setdefault("components", {})["schemas"] = msgspec.json.schema_components(
        BODIES, ref_template=SCHEMAS + "{name}"
    )[1]
    app.add_api_route("/openapi.json", _constant(document), methods=["GET"], include_in_schema=False)
    app.add_exception_handler(TabstopError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_error)
    app.add_middleware(Ceilings, counts=state.counts, max_open=config.max_open_requests)
    app.add_middleware(Guard, config=config, keys=state.keys)
    app.add_middleware(Edge, on_response=metrics.on_response)
    return app


@dataclass(frozen=True, slots=True)
class Route:
    """A path and what is there."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    is_versioned: bool = False  # also under /v1
    body: type[msgspec.Struct] | None = None
    scope: str | None = INFER  # that a key must have; None: any key will do


class Endpoints:
    """What each path does. An endpoint reads, decodes and answers; meaning is the dialect's and the service's."""

    def __init__(self, service: Service, config: ServerConfig, state: ServerState, metrics: Metrics) -> None:
        self._service = service
        self._config = config
        self._state = state
        self._metrics = metrics

    def routes(self) -> list[Route]:
        return [
            Route("POST", "/completions", self.completions, "Complete a text", True, CompletionBody),
            Route("POST", "/chat/completions", self.chat, "Answer a chat", True, ChatBody),
            Route("POST", "/fim/completions", self.fim, "Fill a hole (Mistral)", True, MistralBody),
            Route("POST", "/infill", self.infill, "Fill a hole (llama.cpp)", True, InfillBody),
            Route("POST", "/completion", self.completion, "Complete a text (llama.cpp)", False, LlamaCompletionBody),
            Route("GET", "/props", self.props, "The server as llama.cpp describes itself"),
            Route("GET", "/slots", self.slots, "What runs, as llama.cpp says it", scope=ADMIN),
            Route("POST", "/apply-template", self.apply_template, "Messages to a prompt", False, TemplateBody),
            Route("GET", "/models", self.models, "List models", True),
            Route("GET", "/models/{model:path}", self.model, "Describe a model", True),
            Route("POST", "/tokenize", self.tokenize, "Text to token ids", True, TokenizeBody),
            Route("POST", "/detokenize", self.detokenize, "Token ids to text", True, DetokenizeBody),
            Route("GET", "/livez", self.livez, "200 while the process answers", scope=None),
            Route("GET", "/readyz", self.readyz, "200 when requests are welcome, else 503 with the reason", scope=None),
            Route("GET", "/health", self.readyz, "As /readyz, behind the key", True, scope=None),
            Route("GET", "/version", self.version, "The server's version", True, scope=None),
            Route("GET", "/metrics", self.metrics, "Prometheus metrics", scope=ADMIN),
        ]

    # ---- generating

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionBody)
        return self._reply(body, completion_call(body, _caller(request)), CompletionFormat)

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatBody)
        return self._reply(body, chat_call(body, _caller(request)), ChatFormat)

    async def fim(self, request: Request) -> Response:
        body = await self._read(request, MistralBody)
        return self._reply(body, fim_call(body, _caller(request)), FimFormat)

    async def infill(self, request: Request) -> Response:
        body = await self._read(request, InfillBody)
        return self._llama_reply(body, infill_call(body, _caller(request)))

    async def completion(self, request: Request) -> Response:
        body = await self._read(request, LlamaCompletionBody)
        return self._llama_reply(body, llama_completion_call(body, _caller(request)))

    def _llama_reply(self, body: LlamaBody, call: Call) -> Response:
        max_model_len = self._service.resolve(call.model).max_model_len
        form = LlamaFormat(self._service.shown_name(call.model), body, max_model_len)
        return Reply(self._service, call, form, stream=bool(body.stream))

    def _reply(self, body: Generation, call: Call, form: type[CompletionFormat | ChatFormat]) -> Response:
        model = self._service.shown_name(call.model)
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        shown = PromptShown(call.num_logprobs if call.echo else None, call.num_prompt_logprobs)
        written = form(model, len(call.prompts) * call.num_samples, wants_usage, shown)
        return Reply(self._service, call, written, stream=bool(body.stream))

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        self._state.check_admission()
        if issubclass(kind, Generation):
            self._service.check_room()
        return decode_body(await read_body(request, self._config), kind)

    # ---- about models and tokens

    async def models(self, request: Request) -> Response:
        cards = [_card(model, name) for model in self._service.models for name in (model.name, *model.aliases)]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        model = self._service.resolve(name)
        if name not in (model.name, *model.aliases):
            raise UnknownModelError("no model of that name is served here; see /v1/models", param="model")
        return _json(_card(model, name))

    async def tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeBody)
        model = self._service.resolve(body.model or "")
        return _json(await asyncio.to_thread(tokenize, body, model.text, model.max_model_len))

    async def detokenize(self, request: Request) -> Response:
        body = await self._read(request, DetokenizeBody)
        model = self._service.resolve(body.model or "")
        return _json(await asyncio.to_thread(detokenize, body, model.text))

    async def apply_template(self, request: Request) -> Response:
        body = await self._read(request, TemplateBody)
        return _json(await asyncio.to_thread(apply_template, body, self._service.resolve(body.model or "")))

    async def props(self, request: Request) -> Response:
        return _json(props(self._service.models[0]))

    async def slots(self, request: Request) -> Response:
        return _json(slots(self._service.models[0]))

    # ---- about the server

    async def livez(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        self._state.check_ready(self._service)
        return _json({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return _json({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        return Response(await asyncio.to_thread(self._metrics.page), media_type=CONTENT_TYPE)


def _caller(request: Request) -> Caller:
    state: Mapping[str, Any] = request.scope["state"]
    key = state["key"]
    best = Priority.INTERACTIVE if key is None else key.priority
    return Caller(state["request_id"], state["tenant"], request.headers, best, state.get("spend_tokens"))


def _scoped(scope: str | None, endpoint: Endpoint) -> Endpoint:
    """The endpoint, for keys that have the scope. Without keys everything is open to who gets past the guard."""
    if scope is None:
        return endpoint

    async def run(request: Request) -> Response:
        key = request.scope["state"]["key"]
        if key is not None and scope not in key.scopes:
            raise ForbiddenError(f"this path needs a key of scope {scope}, and this one has {', '.join(key.scopes)}")
        return await endpoint(request)

    return run


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "tabstop",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "fim": model.text.fill.name or False,
        "aliases": [other for other in (model.name, *model.aliases) if other != name],
    }


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TabstopError):
        return error_response(error)
    if isinstance(error, HTTPException):
        return routing_response(error)
    return Response(status_code=499)  # the client has left; nobody reads this


def _constant(document: dict[str, Any]) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        return _json(document)

    return endpoint


def _request_body(body: type[msgspec.Struct] | None) -> dict[str, Any] | None:
    if body is None:
        return None
    schema = {"$ref": SCHEMAS + body.__name__}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
