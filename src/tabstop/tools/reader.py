"""Reads content and calls out of an answer's text as it grows: what all formats share.

One CallReader a sample. A format (tools/<format>.py) is a sequence of steps over its source; what turns out to be no
call comes out as the text that it was. Blanks beside calls are no content.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from tabstop.grammar.specs import Thinking
from tabstop.tools import CallPiece, Steps, ToolFormat, ToolUse
from tabstop.tools.expected import OBJECT, Expected, expected_of
from tabstop.tools.growing import Ended, Enough, Malformed, Source
from tabstop.tools.json_stream import read_value, read_whole, written


class CallReader:
    """Text → content and pieces of calls; the same whole as in pieces."""

    def __init__(self, form: ToolFormat, use: ToolUse, thinking: Thinking | None = None) -> None:
        """`thinking`: reasoning that comes first and stays content, whatever it spells."""
        self.source = Source()
        self.num_calls = 0
        """Calls that are whole, or that the end of the answer cut."""
        self.is_done = False
        """Nothing that follows would count."""
        self.was_cut = False
        """The end of the answer cut the last call."""
        self.has_content = False
        """Something came that is neither a call nor blank."""
        self._format = form
        self._is_parallel = use.is_parallel and form.syntax.separator is not None
        self._functions = {function.name: function for function in use.functions}
        self._expected: dict[str, Expected] = {}  # of those that were called
        self._content: list[str] = []
        self._blanks = ""  # the last ones of the content, held until it is known what follows
        self._pieces: list[CallPiece] = []
        self._num_begun = 0
        self._is_open = False
        self._steps = self._read(thinking)
        next(self._steps)

    def feed(self, text: str) -> tuple[str, list[CallPiece]]:
        """(content, pieces of calls) that are certain now."""
        if text and not self.is_done:
            self.source.add(text)
            next(self._steps, None)
        return self._new()

    def finish(self, *, is_cut: bool) -> tuple[str, list[CallPiece]]:
        """The rest. `is_cut`: the answer was not over; an open call stays, with what it has of its arguments."""
        if not self.is_done:
            self.source.end(is_cut=is_cut)
            if is_cut and self._is_open:
                self._is_open, self.was_cut = False, True
                self.num_calls += 1
                self.source.taken()
            else:
                next(self._steps, None)
            if self._blanks and not self.num_calls:
                self._content.append(self._blanks)
        return self._new()

    def _new(self) -> tuple[str, list[CallPiece]]:
        content, pieces = "".join(self._content), self._pieces
        self._content, self._pieces = [], []
        return content, pieces

    def _read(self, thinking: Thinking | None) -> Steps[None]:
        yield
        if thinking is not None:
            try:
                yield from self._pass(thinking)
            except Ended:
                return self._fail()
        while True:
            self.source.taken()
            try:
                yield from self._format.read(self)
            except Enough:
                return
            except Malformed as error:
                self._fail()
                if isinstance(error, Ended):
                    return

    def _pass(self, thinking: Thinking) -> Steps[None]:
        """Over the reasoning, if there is some. Raises Ended."""
        if not thinking.is_open:
            yield from self.source.after_blanks()
            has_begun = yield from self.source.match((thinking.start,))
            self._say(self.source.taken())
            if not has_begun:
                return
        yield from self.text_until((thinking.end,))
        self._say(self.source.taken())

    def _fail(self) -> None:
        """What was taken of a call is content after all."""
        text = self.source.taken()
        if self._is_open:
            self._is_open = False
            self._pieces.append(CallPiece(self._num_begun - 1, has_failed=True))
        if text.strip() or not self.num_calls:
            self._say(text)

    def _say(self, text: str) -> None:
        text = self._blanks + text
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self.has_content = True
            self._content.append(shown)

    # ---- for formats

    def begins_with(self, character: str) -> Steps[bool]:
        """Whether an answer without content so far goes on with this, blanks apart; it is not taken."""
        if self.has_content:
            return False
        is_there = (yield from self.source.after_blanks()) == character
        if not is_there:
            self._say(self.source.taken())
        return is_there

    def text_until(self, markers: Sequence[str]) -> Steps[str]:
        """Takes content up to a marker, and the marker, which belongs to a call. Raises Ended."""
        while True:
            text, marker = self.source.before(markers)
            self.source.taken()
            self._say(text)
            if marker:
                return self.source.take(len(marker))
            yield from self.source.wait()

    def skip(self, *markers: str) -> Steps[str]:
        """Reads over blanks and one of the markers behind a call, if it is there; which it was."""
        yield from self.source.after_blanks()
        marker = yield from self.source.match(markers)
        if not marker:
            self.source.take_cut(markers)
        self.source.taken()
        return marker

    def expected(self, name: str) -> Expected:
        """Of a function's arguments. Raises Malformed for one that was not offered."""
        if name not in self._functions:
            raise Malformed
        if name not in self._expected:
            self._expected[name] = expected_of(self._functions[name].parameters)
        return self._expected[name]

    def begin(self, name: str) -> None:
        """A call of a function that was offered; its arguments follow."""
        self._pieces.append(CallPiece(self._num_begun, f"call_{uuid.uuid4().hex[:24]}", name))
        self._num_begun += 1
        self._is_open = True

    def write(self, text: str) -> None:
        """What comes next of the arguments, as JSON."""
        index = self._num_begun - 1
        if self._pieces and self._pieces[-1].index == index and not self._pieces[-1].has_failed:
            self._pieces[-1].arguments += text
        else:
            self._pieces.append(CallPiece(index, arguments=text))

    def end(self) -> None:
        """The call is whole."""
        self._is_open = False
        self._blanks = ""
        self.num_calls += 1
        self.source.taken()
        self.is_done = not self._is_parallel
        if self.is_done:
            raise Enough

    def arguments(self, name: str) -> Steps[None]:
        """Reads the arguments of a call and begins it: an object, or its JSON in a string; null for none."""
        expected = self.expected(name)
        if (yield from self.source.after_blanks()) == "{":
            self.begin(name)
            yield from read_value(self.source, expected, self.write)
        else:
            self.begin_with(name, (yield from read_whole(self.source)))

    def begin_with(self, name: str, value: object) -> None:
        """A call whose arguments are known."""
        expected = self.expected(name)
        value = {} if value is None else OBJECT.coerced(value)
        if not isinstance(value, dict):
            raise Malformed
        text = written(expected.coerced(value))
        self.begin(name)
        self.write(text)
