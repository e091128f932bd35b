"""Mistral: behind [TOOL_CALLS] a list of JSON objects, or since 2025 a name, [ARGS] and its arguments.

What stands between the name and [ARGS] in some models, [CALL_ID] and an id, is read over: ids are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from tabstop.tools import MAX_NAME, NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.json_calls import read_list
from tabstop.tools.reader import CallReader

OPEN, ARGUMENTS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"

LIST = CallSyntax(f'{{"name": "{NAME}", "arguments": ', "}", opening=f"{OPEN}[", separator=", ", closing="]")
NAMED = CallSyntax(f"{OPEN}{NAME}{ARGUMENTS}", "")


@dataclass(frozen=True, slots=True)
class Mistral:
    """A ToolFormat."""

    syntax: CallSyntax
    markers: tuple[str, ...] = (OPEN, ARGUMENTS, ID)

    def read(self, calls: CallReader) -> Steps[None]:
        source = calls.source
        yield from calls.text_until((OPEN,))
        if (yield from source.after_blanks()) in "[{":
            return (yield from read_list(calls))
        name, marker = yield from source.until((ARGUMENTS, ID, "{"), MAX_NAME + 2)
        name = name.strip()
        calls.expected(name)
        if marker == ID:
            yield from source.until((ARGUMENTS,), MAX_NAME)
        if marker != "{":
            yield from source.expect(ARGUMENTS)
        yield from calls.arguments(name)
        calls.end()


def find(template: str) -> ToolFormat | None:
    return make(template) if OPEN in template else None


def make(template: str) -> ToolFormat:
    return Mistral(NAMED if ARGUMENTS in template else LIST)
