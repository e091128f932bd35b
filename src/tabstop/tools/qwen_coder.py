"""Qwen3-Coder and its successors: <function=name> with a <parameter=key> for each argument, inside <tool_call>.

Values are bare text, so the schema says what they are; texts go out as they come.
"""

from __future__ import annotations

import json

from tabstop.tools import MAX_NAME, NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.expected import Expected, dump
from tabstop.tools.json_stream import written
from tabstop.tools.reader import CallReader

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

VALUE_ENDS = (f"\n{PARAMETER_END}", PARAMETER_END, f"\n{PARAMETER}", f"\n{FUNCTION_END}")
"""The model forgets the end tag at times; then the next tag at the start of a line ends a value."""

NULLS = tuple(word + end for word in ("null", "None") for end in VALUE_ENDS[:2])

MAX_KEY = 256


class QwenCoder:
    """A ToolFormat."""

    markers = (OPEN, CLOSE)
    syntax = CallSyntax(f"{OPEN}\n{FUNCTION}{NAME}>\n", f"{FUNCTION_END}\n{CLOSE}", separator="\n", arguments="xml")

    def read(self, calls: CallReader) -> Steps[None]:
        source = calls.source
        if (yield from calls.text_until((OPEN, FUNCTION))) == OPEN:
            yield from source.expect(FUNCTION)
        name = yield from _read_name(calls, MAX_NAME + 2)
        expected = calls.expected(name)
        calls.begin(name)
        separator = "{"
        while (yield from source.expect(PARAMETER, FUNCTION_END, CLOSE)) == PARAMETER:
            key = yield from _read_name(calls, MAX_KEY)
            calls.write(f"{separator}{dump(key)}: ")
            yield from _read_value(calls, expected.property(key))
            separator = ", "
        calls.write("{}" if separator == "{" else "}")
        calls.end()
        yield from calls.skip(CLOSE)


def _read_name(calls: CallReader, most: int) -> Steps[str]:
    """What stands behind `=` in a tag."""
    name, _ = yield from calls.source.until((">",), most)
    calls.source.take(1)
    return name.strip().strip("\"'")


def _read_value(calls: CallReader, expected: Expected) -> Steps[None]:
    """One line end on each side is none of the value's."""
    source = calls.source
    yield from source.match(("\n",))
    if "null" in expected.types and (yield from source.match(NULLS)):
        return calls.write("null")
    if expected.allows("string"):
        calls.write('"')
    parts: list[str] = []
    while True:
        text, marker = source.before(VALUE_ENDS)
        if expected.allows("string"):
            calls.write(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            parts.append(text)
        if marker:
            break
        yield from source.wait()
    if marker.endswith(PARAMETER_END):
        source.take(len(marker))
    calls.write('"' if expected.allows("string") else written(expected.coerced("".join(parts))))


def find(template: str) -> ToolFormat | None:
    return make(template) if FUNCTION in template and PARAMETER in template else None


def make(template: str) -> ToolFormat:
    return QwenCoder()
