"""Granite 3: a list of JSON objects behind <|tool_call|>, or behind nothing. (Granite 4 writes as Hermes does.)"""

from __future__ import annotations

from tabstop.tools import NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.json_calls import read_list
from tabstop.tools.reader import CallReader

OPEN = "<|tool_call|>"
SPELLED = "<tool_call>"


class Granite:
    """A ToolFormat."""

    markers = (OPEN,)
    syntax = CallSyntax(f'{{"name": "{NAME}", "arguments": ', "}", opening=f"{OPEN}[", separator=", ", closing="]")

    def read(self, calls: CallReader) -> Steps[None]:
        if not (yield from calls.begins_with("[")):
            yield from calls.text_until((OPEN, SPELLED))
        yield from read_list(calls)


def find(template: str) -> ToolFormat | None:
    return make(template) if OPEN in template else None


def make(template: str) -> ToolFormat:
    return Granite()
