"""Models that think before they answer: their tags, and a text as it comes → reasoning and answer.

The tags are found in the chat template, or named (--reasoning). Whether an answer begins inside the reasoning is seen
at the end of its prompt: some templates open it, some close it at once when thinking is switched off, most leave it to
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from tabstop.errors import ConfigError
from tabstop.grammar.specs import Thinking
from tabstop.text.tokenizer import Tokenizer

AUTO, OFF = "auto", "off"

LINE_ENDS = "\r\n"
"""Those around the tags belong to neither reasoning nor answer: templates put them there again."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What stands around a model's reasoning."""

    name: str
    start: str
    end: str


STYLES = {
    style.name: style
    for style in (
        Reasoning("think", "<think>", "</think>"),  # Qwen3, DeepSeek-R1, GLM-4.5, Phi-4-reasoning, Seed-Coder, …
        Reasoning("mistral", "[THINK]", "[/THINK]"),
        Reasoning("seed", "<seed:think>", "</seed:think>"),
        Reasoning("granite", "Here is my thought process:", "Here is my response:"),
    )
}


def find_reasoning(wanted: str, template: str | None) -> Reasoning | None:
    """`wanted`: auto, off or a style; `template`: the chat template's source. Raises ConfigError."""
    if wanted in STYLES:
        return STYLES[wanted]
    if wanted not in (AUTO, OFF):
        raise ConfigError(f"--reasoning is {wanted!r}; choose one of {AUTO}, {OFF}, {', '.join(STYLES)}")
    if wanted == OFF or template is None:
        return None
    return next((style for style in STYLES.values() if style.end in template), None)


def thinking_in(
    reasoning: Reasoning | None, tokenizer: Tokenizer, prompt_ids: Sequence[int], begun: str
) -> Thinking | None:
    """What of the answer to a prompt is reasoning; None: nothing.

    `begun`: what there is of the answer already, if the prompt ends within it.
    """
    if reasoning is None:
        return None
    start, end = reasoning.start, reasoning.end
    tail = b"".join(tokenizer.spelled(token_id) for token_id in prompt_ids[-MAX_TAG_TOKENS:]).decode(errors="replace")
    is_open, is_closed = tail.rstrip().endswith(start), tail.rstrip().endswith(end)
    if begun.strip() and not is_open and not is_closed:
        is_open = begun.rfind(start) > begun.rfind(end)
        is_closed = not is_open
    if is_closed:
        return None
    control = tokenizer.control_tokens
    return Thinking(start, end, is_open, control.get(start), control.get(end))


MAX_TAG_TOKENS = 64
"""At a prompt's end: a tag, at worst a token a byte, and blanks."""


class _Place(Enum):
    BEFORE = 1  # nothing but blanks and the beginning of a tag has come
    INSIDE = 2
    BEHIND = 3  # the answer's first character has not come
    ANSWER = 4


class ReasoningReader:
    """The text state of one answer: what comes is told apart in the same way however it is cut into pieces."""

    def __init__(self, thinking: Thinking) -> None:
        self._start, self._end = thinking.start, thinking.end
        self._place = _Place.INSIDE if thinking.is_open else _Place.BEFORE
        self._held = ""
        self._has_begun = False  # some reasoning went out

    @property
    def is_inside(self) -> bool:
        """Whether what has come by now ends within the reasoning."""
        return self._place is _Place.INSIDE

    @property
    def is_undecided(self) -> bool:
        return self._place is _Place.BEFORE

    def feed(self, text: str, *, is_last: bool = False) -> tuple[str, str]:
        """(reasoning, answer) that are certain now; `is_last`: no text follows."""
        self._held += text
        if self._place is _Place.BEFORE:
            self._open(is_last)
        reasoning = self._read(is_last) if self._place is _Place.INSIDE else ""
        if self._place is _Place.BEHIND and (rest := self._held.lstrip(LINE_ENDS)):
            self._held, self._place = rest, _Place.ANSWER
        if self._place is not _Place.ANSWER:
            return reasoning, ""
        answer, self._held = self._held, ""
        return reasoning, answer

    def _open(self, is_last: bool) -> None:
        opening = self._held.lstrip()
        if opening.startswith(self._start):
            self._held, self._place = opening[len(self._start) :], _Place.INSIDE
        elif is_last or not self._start.startswith(opening):
            self._place = _Place.ANSWER

    def _read(self, is_last: bool) -> str:
        """Reasoning up to the end tag, or up to what may become it, with the line ends before it."""
        if not self._has_begun:
            self._held = self._held.lstrip(LINE_ENDS)
        place = self._held.find(self._end)
        if place >= 0:
            found = self._held[:place].rstrip(LINE_ENDS)
            self._held, self._place = self._held[place + len(self._end) :], _Place.BEHIND
        else:
            kept = len(self._held) if is_last else self._num_certain()
            found, self._held = self._held[:kept], self._held[kept:]
        self._has_begun = self._has_begun or bool(found)
        return found

    def _num_certain(self) -> int:
        held = self._held
        lengths = range(min(len(self._end) - 1, len(held)), 0, -1)
        place = len(held) - next((length for length in lengths if held.endswith(self._end[:length])), 0)
        return len(held[:place].rstrip(LINE_ENDS))


def split_reasoning(text: str, thinking: Thinking | None) -> tuple[str, str]:
    """(reasoning, answer) of a whole text."""
    return ("", text) if thinking is None else ReasoningReader(thinking).feed(text, is_last=True)
