"""Hermes 2 Pro, Qwen2.5, Qwen3, Granite 4 and many others: JSON objects between <tool_call> and </tool_call>."""

from __future__ import annotations

from tabstop.tools import NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.json_calls import read_object
from tabstop.tools.reader import CallReader

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    """A ToolFormat."""

    markers = (OPEN, CLOSE)
    syntax = CallSyntax(f'{OPEN}\n{{"name": "{NAME}", "arguments": ', f"}}\n{CLOSE}", separator="\n")

    def read(self, calls: CallReader) -> Steps[None]:
        yield from calls.text_until((OPEN,))
        yield from read_object(calls)
        yield from calls.skip(CLOSE)


def find(template: str) -> ToolFormat | None:
    return make(template) if OPEN in template else None


def make(template: str) -> ToolFormat:
    return Hermes()
