"""JSON read as it comes and written again as it is read, in the types that a schema expects.

A text where a text may be goes out character by character. What has another type than expected is read whole first.
Line breaks inside strings, which models forget to escape, are escaped; all else must be JSON. Raises Malformed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tabstop.tools import Steps
from tabstop.tools.expected import ANYTHING, WORDS, Expected, dump, kind_of
from tabstop.tools.growing import Malformed, Source

Write = Callable[[str], None]

MAX_DEPTH = 64
"""Objects and arrays inside each other."""

MAX_SCALAR = 1024
"""Characters of a number."""

PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
SCALAR = re.compile(r'[^\s,:"{}\[\]]+')
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})')

KINDS = {'"': "string", "{": "object", "[": "array"}


def read_value(source: Source, expected: Expected, write: Write, depth: int = 0) -> Steps[None]:
    """Reads one value and writes it."""
    first = yield from source.after_blanks()
    kind = KINDS.get(first)
    if kind is None:
        write(_scalar((yield from _read_scalar(source)), expected))
    elif not expected.allows(kind):
        write(written(expected.coerced((yield from read_whole(source, depth)))))
    elif kind == "string":
        yield from _read_text(source, write)
    elif depth >= MAX_DEPTH:
        raise Malformed
    elif kind == "object":
        yield from _read_object(source, expected, write, depth + 1)
    else:
        yield from _read_array(source, expected, write, depth + 1)


def read_whole(source: Source, depth: int = 0) -> Steps[Any]:
    """Reads one value of any type."""
    parts: list[str] = []
    yield from read_value(source, ANYTHING, parts.append, depth)
    try:
        return json.loads("".join(parts))
    except ValueError:  # a number with thousands of digits
        raise Malformed from None


def read_string(source: Source) -> Steps[str]:
    """Reads a string; its text."""
    if (yield from source.after_blanks()) != '"':
        raise Malformed
    text: str = yield from read_whole(source)
    return text


def expect(source: Source, *allowed: str) -> Steps[str]:
    """Takes the next character that is no blank."""
    if (yield from source.after_blanks()) not in allowed:
        raise Malformed
    return source.take(1)


def _read_object(source: Source, expected: Expected, write: Write, depth: int) -> Steps[None]:
    write(source.take(1))
    if (yield from source.after_blanks()) == "}":
        return write(source.take(1))
    while True:
        key = yield from read_string(source)
        yield from expect(source, ":")
        write(f"{dump(key)}: ")
        yield from read_value(source, expected.property(key), write, depth)
        if (yield from expect(source, ",", "}")) == "}":
            return write("}")
        write(", ")


def _read_array(source: Source, expected: Expected, write: Write, depth: int) -> Steps[None]:
    write(source.take(1))
    if (yield from source.after_blanks()) == "]":
        return write(source.take(1))
    item = expected.item()
    while True:
        yield from read_value(source, item, write, depth)
        if (yield from expect(source, ",", "]")) == "]":
            return write("]")
        write(", ")


def _read_text(source: Source, write: Write) -> Steps[None]:
    """A string, from quote to quote."""
    write(source.take(1))
    while True:
        if plain := source.take_all(PLAIN):
            write(plain)
        character = yield from source.peek()
        if character == '"':
            return write(source.take(1))
        if character == "\\":
            escaped = yield from source.peek(2)
            escaped = (yield from source.peek(6)) if escaped == "\\u" else escaped
            if not ESCAPE.fullmatch(escaped):
                raise Malformed
            write(source.take(len(escaped)))
        elif character < " ":
            write(json.dumps(source.take(1))[1:-1])


def _read_scalar(source: Source) -> Steps[str]:
    """Up to what cannot belong to it, which must have come: nothing but an object or array ends a text of calls."""
    text = ""
    while True:
        text += source.take_all(SCALAR)
        if len(text) > MAX_SCALAR:
            raise Malformed
        following = yield from source.peek()
        if not SCALAR.match(following):
            return text


def _scalar(text: str, expected: Expected) -> str:
    if text in WORDS:
        value = WORDS[text]
        return written(value if expected.allows(kind_of(value)) else expected.coerced(value))
    if not NUMBER.fullmatch(text):
        raise Malformed
    is_whole = not any(character in text for character in ".eE")
    if expected.allows("integer" if is_whole else "number"):
        return text
    if "string" in expected.types:
        return written(text)
    try:
        return written(expected.coerced(json.loads(text)))
    except ValueError:
        raise Malformed from None


def written(value: Any) -> str:
    """JSON of a value. Raises Malformed for what JSON does not have."""
    try:
        return dump(value)
    except (ValueError, RecursionError):
        raise Malformed from None
