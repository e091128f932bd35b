"""What stands in front of every route, as plain ASGI (BaseHTTPMiddleware would hide disconnects).

Edge: request ids, tidy paths, and the last catch of errors. Guard: nobody without the key gets past it, whatever the
path (default deny); without a key, no foreign web page does. Pages that pass may read the answers (CORS).
"""

from __future__ import annotations

import hashlib
import hmac
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
from tabstop.errors import AuthenticationError, ForbiddenError, InternalError, TabstopError

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
                await error_response(error)(scope, receive, send_with_id)


class Guard:
    """Lets a request pass that carries the key, or, when there is none, one that no foreign web page can have sent."""

    def __init__(self, app: ASGIApp, key: str | None, *, is_loopback: bool) -> None:
        self._app = app
        self._digest = _digest(key) if key else None
        self._tenant = self._digest.hex()[:16] if self._digest else ""
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            origin = headers.get("origin")
            if origin is not None and self._is_shared(headers):
                if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await _preflight_response(headers)(scope, receive, _shared_with(origin, send))
                    return
                send = _shared_with(origin, send)
            try:
                if scope["path"] not in OPEN_PATHS:
                    self._check(headers)
            except TabstopError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = self._tenant
        elif scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _is_shared(self, headers: Headers) -> bool:
        """Whether the page that asks may read the answer: never a page of another site, with or without a key."""
        is_local = not self._is_loopback or self._digest is not None or _is_local(headers.get("host"))
        return is_local and _is_own_origin(headers.get("origin"))

    def _check(self, headers: Headers) -> None:
        """Raises AuthenticationError or ForbiddenError."""
        if self._digest is not None:
            given = _keys(headers)
            # Digests of equal length, all of them compared: time tells nothing about the key.
            if not sum(hmac.compare_digest(_digest(key), self._digest) for key in given):
                problem = "the key is wrong" if given else "this server needs a key"
                raise AuthenticationError(f"{problem}; send it as `Authorization: Bearer <key>`")
        elif self._is_loopback and not (_is_local(headers.get("host")) and _is_own_origin(headers.get("origin"))):
            raise ForbiddenError(
                "a server without a key answers only to local names, not to web pages of other sites; set a key to "
                "serve it under a public name"
            )


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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


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
