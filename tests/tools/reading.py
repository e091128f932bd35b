"""Reads texts of calls, whole and in pieces, as the tests look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tabstop.tools import Function, ToolFormat, ToolUse, load_format
from tabstop.tools.reader import CallReader

WEATHER = Function(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "hourly": {"type": "boolean"},
            "note": {"type": ["string", "null"]},
            "place": {"type": "object", "properties": {"at": {"type": "array", "items": {"type": "number"}}}},
        },
        "required": ["city"],
    },
)
USE = ToolUse((WEATHER, Function("now")))


@dataclass
class Heard:
    """What came of one text. Ids are left out: they are random."""

    content: str = ""
    calls: list[list[Any]] = field(default_factory=list)  # name, arguments, whether it failed
    num_calls: int = 0

    @property
    def good(self) -> list[tuple[str, str]]:
        return [(name, arguments) for name, arguments, has_failed in self.calls if not has_failed]


def made(name: str, template: str = "") -> ToolFormat:
    form = load_format(template, name)
    assert form is not None
    return form


def hear(form: ToolFormat, pieces: Sequence[str], use: ToolUse = USE, *, is_cut: bool = False) -> Heard:
    reader, heard = CallReader(form, use), Heard()
    for text in (*pieces, None):
        content, news = reader.finish(is_cut=is_cut) if text is None else reader.feed(text)
        heard.content += content
        for piece in news:
            if piece.name:
                assert piece.id.startswith("call_") and piece.index == len(heard.calls)
                heard.calls.append([piece.name, "", False])
            heard.calls[piece.index][1] += piece.arguments
            heard.calls[piece.index][2] |= piece.has_failed
    heard.num_calls = reader.num_calls
    return heard


def cut_at(text: str, places: Sequence[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]
