"""JSON schemas as llguidance takes them: what it gets wrong is put otherwise, and what it says, into our words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tabstop.errors import InputError

WHITESPACE = r"[ ]|\r?\n[ \t]{0,64}"
"""Between the parts of JSON: what people write. Models that may write blanks without end sometimes do."""

OPTIONS = {
    "x-guidance": {
        "item_separator": ",",
        "key_separator": ":",
        "whitespace_flexible": True,
        "whitespace_pattern": WHITESPACE,
        "coerce_one_of": False,  # would allow what two branches match
        "lenient": False,  # would ignore what is not implemented
    }
}
"""For every schema, whatever its x-guidance says."""

VALUES = ("const", "enum", "default", "examples")
"""Keywords whose values are no schemas."""

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")

STEP = 1e-6
"""How far from an excluded whole number a range begins, where llguidance would allow that number."""

MESSAGES = (
    (r"Unimplemented keys: (.*)", r"it uses \1, which cannot be followed; leave them out"),
    (r"oneOf constraints are not supported.*", "oneOf needs branches that exclude each other by type; use anyOf"),
)
"""What llguidance says of schemas, and how a client understands it."""


def prepared(text: str, max_depth: int) -> str:
    """A client's schema, in llguidance's form. Raises InputError."""
    too_deep = InputError(f"the JSON schema is nested more than {max_depth} levels deep (--max-grammar-depth)")
    try:
        schema = json.loads(text)
    except RecursionError:
        raise too_deep from None
    except ValueError as error:
        raise InputError(f"the JSON schema is not valid JSON: {error}") from None
    schema = {} if schema is True else schema
    if not isinstance(schema, dict):
        raise InputError("the JSON schema must be an object")
    if _is_deeper(schema, max_depth):
        raise too_deep
    return json.dumps({"json_schema": _mended(schema) | OPTIONS})


def explained(message: str) -> str:
    """llguidance's message about a schema, for its client."""
    for pattern, words in MESSAGES:
        message = re.sub(pattern, words, message)
    return message


def _mended(node: Any) -> Any:
    """The schema, where exclusive bounds of numbers are as llguidance 1.9.1 reads them right.

    It allows N for N < x < M where M is less than N + 1, and on the other side alike; such a range begins a little
    later here.
    """
    if isinstance(node, list):
        return [_mended(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    mended = {key: value if key in VALUES else _mended(value) for key, value in node.items()}
    low, high = _tightest(node, LOWER, max), _tightest(node, UPPER, min)
    if node.get("type") == "integer" or low is None or high is None or not 0 < high - low < 1:
        return mended
    step = min(STEP, (high - low) / 4)
    for (inclusive, exclusive), moved in ((LOWER, low + step), (UPPER, high - step)):
        if _is_number(node.get(exclusive)) and float(node[exclusive]).is_integer():
            del mended[exclusive]
            mended[inclusive] = moved
    return mended


def _tightest(node: dict[str, Any], names: tuple[str, str], tighter: Callable[..., Any]) -> float | None:
    """Of a node's two bounds on one side."""
    found: float | None = tighter((node[name] for name in names if _is_number(node.get(name))), default=None)
    return found


def _is_number(value: Any) -> bool:
    """One whose fraction a float knows."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 52


def _is_deeper(value: Any, most: int) -> bool:
    """Whether objects and lists are nested more than `most` levels deep."""
    level = [value]
    for _ in range(most + 1):
        if not level:
            return False
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _entries(outer)]
    return bool(level)


def _entries(outer: dict[str, Any] | list[Any]) -> list[Any]:
    return list(outer.values()) if isinstance(outer, dict) else outer
