"""Llama 3.1 to 3.3: the whole answer is a JSON object {"name": …, "parameters": {…}}, or several between semicolons.

<|python_tag|> may stand before it. Any other answer, JSON or not, is content. Some templates refuse several calls in
one message; with them there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tabstop.tools import NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.json_calls import read_object
from tabstop.tools.reader import CallReader

TAG = "<|python_tag|>"


SYNTAX = CallSyntax(f'{{"name": "{NAME}", "parameters": ', "}", separator="; ")


@dataclass(frozen=True, slots=True)
class Llama3:
    """A ToolFormat."""

    syntax: CallSyntax
    markers: tuple[str, ...] = (TAG,)

    def read(self, calls: CallReader) -> Steps[None]:
        if not (yield from calls.begins_with("{")):
            yield from calls.text_until((TAG,))
        while True:
            yield from read_object(calls)
            if not (yield from calls.skip(";", TAG)):
                return


def find(template: str) -> ToolFormat | None:
    is_llama = "<|start_header_id|>" in template and "ipython" in template and '"parameters"' in template
    return make(template) if TAG in template or is_llama else None


def make(template: str) -> ToolFormat:
    return Llama3(replace(SYNTAX, separator=None) if "single tool-calls" in template else SYNTAX)
