"""Calls that are JSON objects with a name and arguments, alone or in a list: what several formats write."""

from __future__ import annotations

from typing import Any

from tabstop.tools import Steps
from tabstop.tools.growing import Malformed
from tabstop.tools.json_stream import expect, read_string, read_whole
from tabstop.tools.reader import CallReader

ARGUMENTS = ("arguments", "parameters")


def read_object(calls: CallReader, *, is_marked: bool = True) -> Steps[None]:
    """Reads {"name": …, "arguments": {…}}, in any order and with other keys. One that lacks but its end is whole.

    Where no marker says that it is a call, its name must come first, and its arguments be there.
    """
    source, name, is_begun = calls.source, "", False
    held: list[Any] = []  # arguments that came before the name
    yield from expect(source, "{")
    try:
        while True:
            key = yield from read_string(source)
            yield from expect(source, ":")
            if not (is_marked or name or key == "name"):
                raise Malformed
            if key == "name" and not name:
                name = yield from read_string(source)
                calls.expected(name)
            elif key in ARGUMENTS and name and not (held or is_begun):
                yield from calls.arguments(name)
                is_begun = True
            elif key in ARGUMENTS and not (held or is_begun):
                held.append((yield from read_whole(source)))
            else:
                yield from read_whole(source)
            if (yield from expect(source, ",", "}")) == "}":
                break
    except Malformed:
        if not is_begun and not (name and held):
            raise
    if not (is_begun or held or is_marked):
        raise Malformed
    if not is_begun:
        calls.begin_with(name, held[0] if held else None)
    calls.end()


def read_list(calls: CallReader) -> Steps[None]:
    """Reads a list of such objects, or one alone."""
    source = calls.source
    if (yield from source.after_blanks()) != "[":
        return (yield from read_object(calls))
    source.take(1)
    separator = ","
    while separator == ",":
        yield from read_object(calls)
        separator = yield from expect(source, ",", "]")
