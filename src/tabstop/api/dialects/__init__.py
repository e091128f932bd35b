"""The dialects: a file and a line each. What two of them share is in api/; none imports another."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from tabstop.api import Route

DIALECTS: dict[str, str] = {
    "openai": "tabstop.api.dialects.openai",
    "mistral": "tabstop.api.dialects.mistral",
    "llamacpp": "tabstop.api.dialects.llamacpp",
    "tokens": "tabstop.api.dialects.tokens",
}
"""Name → module with `ROUTES: Sequence[Route]`."""


def dialect_routes() -> Iterator[Route]:
    """Of all dialects, in order."""
    for module in DIALECTS.values():
        yield from import_module(module).ROUTES
