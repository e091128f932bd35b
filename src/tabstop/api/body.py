"""Reads request bodies, with their limits enforced while reading."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from tabstop.errors import InputError, PayloadTooLargeError

READ_TIMEOUT = 60.0
"""Seconds that a client has to send its body."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises PayloadTooLargeError as soon as it is known to be over the limit, InputError when late.

    Raises starlette's ClientDisconnect when the client leaves.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    if request.headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise InputError("compressed bodies are not read; send plain JSON")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(READ_TIMEOUT):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise InputError(f"the body did not arrive within {READ_TIMEOUT:.0f} seconds") from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is over {max_bytes} bytes; send less, or raise --max-body-bytes")
