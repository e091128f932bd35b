"""Reasoning and calls of tools of one running answer: taken out of its text deltas. For answer.py."""

from __future__ import annotations

from collections.abc import Mapping

from tabstop.call import Call, TextDelta, Usage
from tabstop.grammar.specs import Thinking
from tabstop.text.reasoning import ReasoningReader
from tabstop.text.tokenizer import Tokenizer
from tabstop.tools import ToolFormat
from tabstop.tools.reader import CallReader
from tabstop.types import FinishReason


class Parts:
    """Reasoning, content and calls of one choice, told apart."""

    def __init__(
        self, call: Call, thinking: Thinking | None, form: ToolFormat | None, tokenizer: Tokenizer, usage: Usage
    ) -> None:
        """`thinking`, `form`: as the prompt has them. `usage`: where reasoning is counted."""
        apart = None if call.reasoning == "inline" else thinking
        self.control_bytes: Mapping[int, bytes] = shown_control(tokenizer, call.show_control, thinking)
        """What control tokens add to the text."""
        self._thoughts = self._calls = None
        self.may_end = call.min_indent > 0 or (
            form is not None and call.tools is not None and not call.tools.is_parallel
        )
        """What is read, not what the engine says, may end the answer: tokens behind that end shall not count."""
        if apart is not None:
            self._thoughts = Thoughts(apart, tokenizer, usage, is_hidden=call.reasoning == "hidden")
        if form is not None and call.tools is not None:
            self.control_bytes = {**tokenizer.spellings_of(form.markers), **self.control_bytes}
            self._calls = CallReader(form, call.tools, thinking if apart is None else None)

    def read(self, delta: TextDelta) -> None:
        """Moves them out of the delta's text; ends it where nothing more can come."""
        if self._thoughts is not None:
            self._thoughts.read(delta)
        if self._calls is not None:
            _read_calls(self._calls, delta)


def _read_calls(calls: CallReader, delta: TextDelta) -> None:
    delta.text, delta.calls = calls.feed(delta.text)
    if calls.is_done:
        delta.finish, delta.stop_reason = FinishReason.STOP, None
    if delta.finish is not None:
        is_cut = delta.finish is not FinishReason.STOP or delta.stop_reason is not None
        rest, pieces = calls.finish(is_cut=is_cut)
        delta.text += rest
        delta.calls += pieces
        delta.has_calls = calls.num_calls > 0 and not calls.was_cut


class Thoughts:
    """The reasoning of one choice, which is also counted."""

    def __init__(self, thinking: Thinking, tokenizer: Tokenizer, usage: Usage, *, is_hidden: bool) -> None:
        """`usage`: where its tokens are counted. `is_hidden`: they are counted, and nothing else."""
        self._reader = ReasoningReader(thinking)
        self._end_id = tokenizer.token_id(thinking.end)
        self._usage = usage
        self._is_hidden = is_hidden
        self._num_undecided = 0  # tokens

    def read(self, delta: TextDelta) -> None:
        """Moves what is reasoning from the delta's text to its `reasoning`."""
        was_undecided, was_inside = self._reader.is_undecided, self._reader.is_inside
        reasoning, delta.text = self._reader.feed(delta.text, is_last=delta.finish is not None)
        delta.reasoning = "" if self._is_hidden else reasoning
        is_decided = not self._reader.is_undecided
        has_thoughts = was_inside or reasoning or self._reader.is_inside
        if was_undecided and not is_decided:
            self._num_undecided += len(delta.token_ids)
        elif has_thoughts:
            self._usage.num_reasoning_tokens += self._num_undecided + self._num_inside(delta.token_ids)
            self._num_undecided = 0

    def _num_inside(self, token_ids: list[int]) -> int:
        """The end tag's tokens count, what follows it does not where it is one token."""
        if self._end_id is None or self._reader.is_inside or self._end_id not in token_ids:
            return len(token_ids)
        return token_ids.index(self._end_id) + 1


def shown_control(tokenizer: Tokenizer, shows_all: bool, thinking: Thinking | None) -> Mapping[int, bytes]:
    """Control tokens that add to the text: all, or the tags that the reasoning is found by."""
    if shows_all:
        return tokenizer.control_bytes
    tags = (thinking.start_id, thinking.end_id) if thinking is not None else ()
    return {token_id: tokenizer.control_bytes[token_id] for token_id in tags if token_id is not None}
