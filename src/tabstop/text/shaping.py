"""What is done to an answer's text on its way out: line ends of the file, and ends that depend on lines and time.

One Shaper a sample, after its Detokenizer. Knows no tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_OVERLAP = 12
"""Characters, blanks apart, of the suffix that an answer must repeat to be cut there. Fewer may be chance."""

BARE_NEWLINE = re.compile(r"(?<!\r)\n")


@dataclass(frozen=True, slots=True)
class Shape:
    """The rules of an answer."""

    crlf: bool = False  # lines end with CRLF
    min_indent: int = 0  # a line that is indented less, after the first one, ends the answer and is cut
    max_seconds: float | None = None  # from the first text; ends the answer once it has a line end


def overlap_of(suffix: str) -> str:
    """The start of a suffix that an answer must not repeat: whole lines, too many for chance; "" for none."""
    size = end = 0
    for line in suffix.splitlines(keepends=True):
        size += len("".join(line.split()))
        end += len(line)
        if size >= MIN_OVERLAP:
            return suffix[:end]
    return ""


class Shaper:
    """State of one sample. `is_done` once the answer is over; feed nothing after it."""

    def __init__(self, shape: Shape, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_done = False
        self._shape = shape
        self._clock = clock
        self._start: float | None = None
        self._indent = -1  # blanks at the start of the line so far; -1: not at a line's start, or in the first line
        self._has_newline = False
        self._after_return = False

    def feed(self, text: str) -> str:
        """The text as it goes out."""
        if not text:
            return ""
        if self._shape.min_indent:
            text = self._cut_dedented(text)
        self._check_time(text)
        return self._with_line_ends(text) if self._shape.crlf else text

    def _cut_dedented(self, text: str) -> str:
        for at, character in enumerate(text):
            if self._indent >= 0 and character not in " \t" and self._indent < self._shape.min_indent:
                self.is_done = True
                return text[:at]
            if character == "\n":
                self._indent = 0
            elif self._indent >= 0:
                self._indent = self._indent + 1 if character in " \t" else -1
        return text

    def _check_time(self, text: str) -> None:
        self._has_newline = self._has_newline or "\n" in text
        if self._shape.max_seconds is None:
            return
        now = self._clock()
        if self._start is None:
            self._start = now
        if self._has_newline and now - self._start > self._shape.max_seconds:
            self.is_done = True

    def _with_line_ends(self, text: str) -> str:
        if self._after_return and text[:1] == "\n":
            shaped = "\n" + BARE_NEWLINE.sub("\r\n", text[1:])
        else:
            shaped = BARE_NEWLINE.sub("\r\n", text)
        self._after_return = text[-1:] == "\r"
        return shaped
