"""DeepSeek V2.5 to V3.1 and R1: calls between markers of their own.

V3 and R1 write `function`, a separator, the name and a fenced block of JSON; V3.1 the name, a separator and the JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

from tabstop.tools import MAX_NAME, NAME, CallSyntax, Steps, ToolFormat
from tabstop.tools.reader import CallReader

ALL, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"

FENCED = CallSyntax(f"{ONE}function{SEPARATOR}{NAME}\n```json\n", f"\n```{ONE_END}", ALL, "\n", ALL_END)
PLAIN = CallSyntax(f"{ONE}{NAME}{SEPARATOR}", ONE_END, ALL, "", ALL_END)


@dataclass(frozen=True, slots=True)
class DeepSeek:
    """A ToolFormat."""

    syntax: CallSyntax
    markers: tuple[str, ...] = (ALL, ALL_END, ONE, ONE_END, SEPARATOR)

    def read(self, calls: CallReader) -> Steps[None]:
        source = calls.source
        if (yield from calls.text_until((ALL, ONE))) == ALL:
            yield from source.expect(ONE)
        marker = ONE
        while marker == ONE:
            yield from _read_call(calls)
            yield from calls.skip("```")
            yield from calls.skip(ONE_END)
            marker = yield from calls.skip(ONE, ALL_END)


def _read_call(calls: CallReader) -> Steps[None]:
    source = calls.source
    name, _ = yield from source.until((SEPARATOR,), MAX_NAME)
    yield from source.expect(SEPARATOR)
    if (yield from source.after_blanks()) != "{":
        name, _ = yield from source.until(("\n",), MAX_NAME)
        yield from source.after_blanks()
        yield from source.match(("```json", "```"))
    yield from calls.arguments(name.strip())
    calls.end()


def find(template: str) -> ToolFormat | None:
    return make(template) if ONE in template else None


def make(template: str) -> ToolFormat:
    return DeepSeek(FENCED if "```json" in template else PLAIN)
