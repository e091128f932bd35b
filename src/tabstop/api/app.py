"""Joins routes to paths: the FastAPI application of one front end.

Knows what a Route is, and no dialect. Versioned paths are there with and without /v1. Bodies are decoded by msgspec
(schema.py), so /openapi.json is told of their schemas here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tabstop import __version__
from tabstop.api import Route
from tabstop.api.body import read_body
from tabstop.api.ceilings import Ceilings
from tabstop.api.dialects import dialect_routes
from tabstop.api.edge import Edge, Guard
from tabstop.api.endpoints import json_response
from tabstop.api.errors import error_response, routing_response
from tabstop.api.metrics import CONTENT_TYPE, Metrics
from tabstop.api.schema import Generation, decode_body
from tabstop.api.state import ServerState
from tabstop.config import ServerConfig
from tabstop.errors import ForbiddenError, TabstopError
from tabstop.keys import ADMIN
from tabstop.service import Service

Handler = Callable[[Request], Awaitable[Response]]

SCHEMAS = "#/components/schemas/{name}"

READY = "200 when requests are welcome, else 503 with the reason"


def build_app(service: Service, config: ServerConfig, state: ServerState | None = None) -> FastAPI:
    """The application. `state` None: ready at once (tests, other hosts); server.py passes one that it changes."""
    metrics = Metrics(service)
    service.observer = metrics
    app = FastAPI(
        title="Tabstop", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    state = state or ServerState()
    routes = [*dialect_routes(), *_own_routes(service, state, metrics)]
    bodies = [route.body for route in routes if route.body is not None]
    references, schemas = msgspec.json.schema_components(bodies, ref_template=SCHEMAS)
    told = dict(zip(bodies, references, strict=True))
    app.state.error_forms = {}
    for route in routes:
        for path in (f"/v1{route.path}", route.path) if route.is_versioned else (route.path,):
            app.add_api_route(
                path,
                _handler(route, service, config, state),
                methods=[route.method],
                response_model=None,
                summary=route.summary,
                openapi_extra=None if route.body is None else _request_body(told[route.body]),
                operation_id=f"{route.method} {path}",
            )
            if route.error_form is not None:
                app.state.error_forms[path] = route.error_form
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    document.setdefault("components", {})["schemas"] = schemas
    app.add_api_route("/openapi.json", _constant(document), methods=["GET"], include_in_schema=False)
    app.add_exception_handler(TabstopError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientDisconnect, _on_error)
    app.add_middleware(Ceilings, counts=state.counts, max_open=config.max_open_requests)
    app.add_middleware(Guard, config=config, keys=state.keys)
    app.add_middleware(Edge, on_response=metrics.on_response)
    return app


def _handler(route: Route, service: Service, config: ServerConfig, state: ServerState) -> Handler:
    """Checks the key's scope, reads and decodes the body, answers. Without keys all is open to who passed the guard."""

    async def handle(request: Request) -> Response:
        key = request.scope["state"]["key"]
        if route.scope is not None and key is not None and route.scope not in key.scopes:
            held = ", ".join(key.scopes)
            raise ForbiddenError(f"this path needs a key of scope {route.scope}, and this one has {held}")
        body = None
        if route.body is not None:
            state.check_admission()
            if issubclass(route.body, Generation):
                service.check_room()
            body = decode_body(await read_body(request, config), route.body)
        return await route.endpoint(service, request, body)

    return handle


def _own_routes(service: Service, state: ServerState, metrics: Metrics) -> list[Route]:
    """About the server."""

    async def livez(*_: Any) -> Response:
        return json_response({"status": "ok"})

    async def readyz(*_: Any) -> Response:
        state.check_ready(service)
        return json_response({"status": "ok"})

    async def version(*_: Any) -> Response:
        return json_response({"version": __version__})

    async def page(*_: Any) -> Response:
        return Response(await asyncio.to_thread(metrics.page), media_type=CONTENT_TYPE)

    return [
        Route("GET", "/livez", "200 while the process answers", livez, is_versioned=False, scope=None),
        Route("GET", "/readyz", READY, readyz, is_versioned=False, scope=None),
        Route("GET", "/health", "As /readyz, behind the key", readyz, scope=None),
        Route("GET", "/version", "The server's version", version, scope=None),
        Route("GET", "/metrics", "Prometheus metrics", page, is_versioned=False, scope=ADMIN),
    ]


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TabstopError):
        return error_response(error, request.scope)
    if isinstance(error, HTTPException):
        return routing_response(error)
    return Response(status_code=499)  # the client has left; nobody reads this


def _request_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _constant(document: dict[str, Any]) -> Handler:
    async def endpoint(request: Request) -> Response:
        return json_response(document)

    return endpoint
