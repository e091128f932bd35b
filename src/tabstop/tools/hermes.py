"""Hermes 2 Pro, Qwen2.5, Qwen3, Granite 4 and many others: JSON objects between <tool_call> and </tool_call>.

Qwen2.5-Coder was not trained on these markers: it writes the same objects bare, in a fenced block, or in <tools>.
"""

from __future__ import annotations

from tabstop.tools import NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.json_calls import read_object
from tabstop.tools.reader import CallReader

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CLOSES = {OPEN: CLOSE, "```json": "```", "<tools>": "</tools>"}


class Hermes:
    """A ToolFormat."""

    markers = (OPEN, CLOSE)
    syntax = CallSyntax(f'{OPEN}\n{{"name": "{NAME}", "arguments": ', f"}}\n{CLOSE}", separator="\n")

    def read(self, calls: CallReader) -> Steps[None]:
        is_bare = yield from calls.begins_with("{")
        marker = "" if is_bare else (yield from calls.text_until(tuple(CLOSES)))
        yield from read_object(calls, is_marked=marker == OPEN)
        while (yield from calls.source.after_blanks()) == "{":
            yield from read_object(calls, is_marked=False)
        if marker:
            yield from calls.skip(CLOSES[marker])


def find(template: str) -> ToolFormat | None:
    return make(template) if OPEN in template else None


def make(template: str) -> ToolFormat:
    return Hermes()
