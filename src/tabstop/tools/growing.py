"""A text that grows, read by steps that wait for what they need. Knows no calls.

What is read never depends on how the text was cut into pieces: a step waits until what it looks at is certain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabstop.tools import Steps


class Malformed(Exception):
    """What was read is no call."""


class Ended(Malformed):
    """The text ended before what was being read."""


class Enough(Exception):
    """What follows is not read."""


BLANKS = re.compile(r"\s*")


class Source:
    """The text that has come and was not read yet."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_ended = self._is_cut = False
        self._taken: list[str] = []

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self, *, is_cut: bool = False) -> None:
        """Nothing follows. `is_cut`: though something would have."""
        self._is_ended, self._is_cut = True, is_cut

    def taken(self) -> str:
        """What was taken since this was asked last."""
        text = "".join(self._taken)
        self._taken.clear()
        return text

    # ---- steps

    def wait(self) -> Steps[None]:
        """For more text. Raises Ended."""
        if self._is_ended:
            raise Ended
        yield

    def peek(self, count: int = 1) -> Steps[str]:
        """The next characters, not taken."""
        while len(self._text) - self._at < count:
            yield from self.wait()
        return self._text[self._at : self._at + count]

    def after_blanks(self) -> Steps[str]:
        """Takes blanks; the character behind them, not taken."""
        while True:
            self.take_all(BLANKS)
            if self._at < len(self._text):
                return self._text[self._at]
            yield from self.wait()

    def match(self, markers: Sequence[str]) -> Steps[str]:
        """Takes the longest of the markers that comes next; "" if none does."""
        while True:
            left = self._text[self._at : self._at + max(map(len, markers))]
            if self._is_ended or not any(marker != left and marker.startswith(left) for marker in markers):
                break
            yield from self.wait()
        found = max((marker for marker in markers if left.startswith(marker)), key=len, default="")
        return self.take(len(found))

    def expect(self, *markers: str) -> Steps[str]:
        """Takes one of the markers, which must come next, after blanks. Raises Malformed."""
        yield from self.after_blanks()
        found = yield from self.match(markers)
        if not found:
            raise Malformed
        return found

    def until(self, markers: Sequence[str], most: int) -> Steps[tuple[str, str]]:
        """Takes a text of at most so many characters; (text, marker), which is not taken. Raises Malformed."""
        parts = ""
        while True:
            text, marker = self.before(markers)
            parts += text
            if len(parts) > most:
                raise Malformed
            if marker:
                return parts, marker
            yield from self.wait()

    # ---- what is there already

    def take(self, count: int) -> str:
        text = self._text[self._at : self._at + count]
        self._at += count
        self._taken.append(text)
        return text

    def take_cut(self, markers: Sequence[str]) -> None:
        """Takes what the end of a cut text left of one of the markers."""
        left = self._text[self._at :]
        if self._is_cut and any(marker.startswith(left) for marker in markers):
            self.take(len(left))

    def take_all(self, pattern: re.Pattern[str]) -> str:
        """Takes what the pattern matches of what has come; more may follow."""
        found = pattern.match(self._text, self._at)
        return self.take(len(found[0])) if found else ""

    def before(self, markers: Sequence[str]) -> tuple[str, str]:
        """Takes the text before the first of the markers; (text, marker), which is not taken.

        While no marker is certain, what may be the start of one is not taken.
        """
        num_held = 0 if self._is_ended else _num_held(self._text[self._at :], markers)
        certain = len(self._text) - num_held
        found = (
            (place, -len(marker), marker) for marker in markers if (place := self._text.find(marker, self._at)) >= 0
        )
        place, _, marker = min(found, default=(certain, 0, ""))
        if place > certain or (place == certain and num_held):
            place, marker = certain, ""
        return self.take(place - self._at), marker


def _num_held(text: str, markers: Sequence[str]) -> int:
    """How many of the last characters may be the start of a marker that is not there yet."""
    tail = text[-max(map(len, markers)) :]
    opening = {marker[0] for marker in markers}
    for at, character in enumerate(tail):
        if character in opening:
            start = tail[at:]
            if any(marker != start and marker.startswith(start) for marker in markers):
                return len(start)
    return 0
