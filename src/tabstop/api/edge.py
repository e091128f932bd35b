"""What stands in front of every route, as plain ASGI (BaseHTTPMiddleware would hide disconnects).

Edge: request ids, tidy paths, and the last catch of errors. Guard: nobody without the key gets past it, whatever the
path (default deny); without a key, no foreign web page does. Pages that pass may read the answers (CORS).
"""

from __future__ import annotations

import ipaddress
import logging
import re
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tabstop.api.errors import error_response
from tabstop.config import ServerConfig
from tabstop.errors import AuthenticationError, ForbiddenError, InternalError, TabstopError
from tabstop.keys import Key, KeyRing, single_key

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset(("/livez", "/readyz"))
"""Probes need no key."""

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

LOCAL_NAME = re.compile(r"(?:[^.]*|.*\.(?:localhost|local|internal))\.?")
"""Host names that no public name server answers for: without a dot, or under a private ending."""

OnResponse = Callable[[Scope, int], None]
"""(scope, status), once for each response that begins."""


class Edge:
    """The outermost layer: gives every request an id, and every response that id; turns what escapes into a 500."""

    def __init__(self, app: ASGIApp, on_response: OnResponse) -> None:
        self._app = app
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        # A copy: the server below keeps the method, and leaves out the body of an answer to HEAD by itself.
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "state": {"request_id": request_id}}
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                self._on_response(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if not started:
                error = InternalError(f"internal error; the server's log has it under request id {request_id}")
                await error_response(error, scope)(scope, receive, send_with_id)


class Guard:
    """Lets a request pass that carries a key, or, when none is needed, one that no foreign web page can have sent.

    What follows finds the key in scope["state"]["key"] (None where none is needed), its tenant in "tenant".
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: KeyRing) -> None:
        """`keys`: those of --key-file, now and later."""
        self._app = app
        self._rings = [keys] + ([KeyRing([single_key(config.api_key)])] if config.api_key else [])
        self._needs_key = config.needs_key
        self._is_loopback = config.is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and self._is_shared(headers):
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await _preflight_response(headers)(scope, receive, _shared_with(origin, send))
                    return
                send = _shared_with(origin, send)
            key = None
            try:
                if scope["path"] not in OPEN_PATHS:
                    key = self._check(headers)
            except TabstopError as error:
                await error_response(error, scope)(scope, receive, send)
                return
            scope.setdefault("state", {}).update(key=key, tenant="" if key is None else key.tenant or key.name)
        elif scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _is_shared(self, headers: Headers) -> bool:
        """Whether the page that asks may read the answer: never a page of another site, with or without a key."""
        is_local = not self._is_loopback or self._needs_key or _is_local(headers.get("host"))
        return is_local and _is_own_origin(headers.get("origin"))

    def _check(self, headers: Headers) -> Key | None:
        """The request's key, where one is needed. Raises AuthenticationError or ForbiddenError."""
        if self._needs_key:
            given = _keys(headers)
            found = [ring.find(given) for ring in self._rings]
            for key in found:
                if key is not None:
                    return key
            problem = "the key is wrong" if given else "this server needs a key"
            raise AuthenticationError(f"{problem}; send it as `Authorization: Bearer <key>`")
        if self._is_loopback and not (_is_local(headers.get("host")) and _is_own_origin(headers.get("origin"))):
            raise ForbiddenError(
                "a server without a key answers only to local names, not to web pages of other sites; set a key to "
                "serve it under a public name"
            )
        return None


def _preflight_response(headers: Headers) -> Response:
    """What a browser asks before it sends a page's request; it sends no key with the question."""
    allowed = {
        "access-control-allow-methods": "GET, POST",
        "access-control-allow-headers": headers.get("access-control-request-headers", ""),
        "access-control-max-age": "600",
    }
    return Response(status_code=204, headers={name: value for name, value in allowed.items() if value})


def _shared_with(origin: str, send: Send) -> Send:
    """Lets the pages of an origin read the answer."""

    async def send_shared(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers.add_vary_header("origin")
        await send(message)

    return send_shared


def _request_id(headers: Headers) -> str:
    """The client's id if it is a plain one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _keys(headers: Headers) -> list[str]:
    """Every key that a request carries, in whatever header its client puts it."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    keys = [bearer.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key"), headers.get("api-key")]
    return [key for key in keys if key]


def _is_local(host: str | None) -> bool:
    """False for a public name: a web page may have pointed it at this machine (DNS rebinding)."""
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:  # "[" without "]"
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return LOCAL_NAME.fullmatch(name) is not None


def _is_own_origin(origin: str | None) -> bool:
    """False for pages of other sites; editors' own schemes and local pages pass."""
    if origin is None:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return bool(parts.scheme) and (parts.scheme not in ("http", "https") or _is_local(parts.netloc))
