"""Marks inside of what users write, so that a template cannot make control tokens of it.

Tokenizer.encode_marked takes them out; which texts can become a part of a control token, Tokenizer.mark_control knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tabstop.errors import InputError
from tabstop.text.tokenizer import Tokenizer

MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
"""Unicode's noncharacters: they mean nothing in any text, so one that the messages lack can mark places in them."""

TYPES = frozenset(("function", "string", "number", "integer", "boolean", "array", "object", "null"))
"""Values of `type` that templates ask for by name: they stay as they are, and so do KEYS."""

KEYS = frozenset(
    (
        *("role", "content", "text", "name", "id", "type", "function", "arguments", "tool_calls", "tool_call_id"),
        *("reasoning_content", "reasoning", "thinking", "index", "strict", "description", "parameters", "properties"),
        *("required", "items", "enum", "const", "default", "examples", "title", "format", "pattern", "nullable"),
        *(
            "additionalProperties",
            "anyOf",
            "oneOf",
            "allOf",
            "not",
            "$ref",
            "$defs",
            "definitions",
            "return",
            "returns",
        ),
        *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "uniqueItems", "prefixItems"),
    )
)


def free_marks(texts: Any) -> tuple[str, str]:
    """Two that the texts do not have, neither themselves nor as others write them. Raises InputError."""
    free = (mark for mark in MARKS if not _holds(texts, mark) and not _holds(texts, escaped(mark)))
    found = tuple(itertools.islice(free, 2))
    if len(found) < 2:
        raise InputError("messages use Unicode's noncharacters U+FDD0 to U+FDEF; remove them", param="messages")
    return found[0], found[1]


def escaped(mark: str) -> str:
    """As Python and JSON write it inside other values."""
    return f"\\u{ord(mark):04x}"


def _holds(value: Any, mark: str) -> bool:
    if isinstance(value, str):
        return mark in value
    if isinstance(value, Mapping):
        return any(_holds(key, mark) or _holds(inner, mark) for key, inner in value.items())
    return isinstance(value, Sequence) and any(_holds(inner, mark) for inner in value)


def marked_message(message: Mapping[str, Any], tokenizer: Tokenizer, mark: str) -> dict[str, Any]:
    """The message with every text marked; roles are ours."""
    texts: dict[str, Any] = {key: marked(value, tokenizer, mark) for key, value in message.items() if key != "role"}
    return {"role": message["role"]} | texts


def marked(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    if isinstance(value, str):
        return tokenizer.mark_control(value, mark)
    if isinstance(value, Mapping):
        return {
            key if key in KEYS else marked(key, tokenizer, mark): inner
            if key == "type" and isinstance(inner, str) and inner in TYPES
            else marked(inner, tokenizer, mark)
            for key, inner in value.items()
        }
    return [marked(inner, tokenizer, mark) for inner in value] if isinstance(value, (list, tuple)) else value
