"""Reads request bodies, with their limits enforced while reading."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from tabstop.config import ServerConfig
from tabstop.errors import InputError, PayloadTooLargeError, RequestTimeoutError


async def read_body(request: Request, limits: ServerConfig) -> bytes:
    """The whole body. Raises PayloadTooLargeError as soon as it is known to be over the limit, RequestTimeoutError.

    Raises starlette's ClientDisconnect when the client leaves.
    """
    max_bytes = limits.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    if request.headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise InputError("compressed bodies are not read; send plain JSON")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise RequestTimeoutError(f"the body did not arrive within {limits.body_timeout:g} seconds") from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is over {max_bytes} bytes; send less, or raise --max-body-bytes")
