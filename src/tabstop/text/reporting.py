"""Log-probabilities of tokens as clients read them: with each token's spelling and its place in the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from tabstop.text.tokenizer import Tokenizer
from tabstop.types import TokenLogprobs

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """One token and how likely the model found it."""

    token_id: int
    spelled: bytes  # may be a part of a character; of a control token its name
    logprob: float
    rank: int  # 1: the likeliest

    @property
    def text(self) -> str:
        return self.spelled.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class ReportedToken:
    """A token of an answer or of a prompt."""

    chosen: Likelihood
    top: list[Likelihood]  # the likeliest tokens, likeliest first; as many as were asked for
    offset: int  # characters of the text before it


@dataclass(frozen=True, slots=True)
class ReportedPrompt:
    """The tokens of a prompt. Nothing precedes the first, so there is only its spelling."""

    opening: bytes
    tokens: list[ReportedToken]  # from the second on


def report_prompt(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], text: str
) -> ReportedPrompt:
    """`logprobs`: of all ids but the first. `text`: what offsets are counted in; "" where nobody shows it."""
    pairs = zip(ids[1:], logprobs, places(tokenizer, ids, text)[1:], strict=True)
    return ReportedPrompt(tokenizer.spelled(ids[0]), [_reported(tokenizer, *pair) for pair in pairs])


def places(tokenizer: Tokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where in their text tokens begin, in characters. Control tokens take the room that the text has for them: none
    when they were added to it, or when it was made from ids.
    """
    decoder, offset, found = _Utf8Decoder("replace"), 0, []
    is_stripped = not tokenizer.strips_space
    for token_id in ids:
        found.append(offset)
        if spelled := tokenizer.bytes_of([token_id]):
            piece = decoder.decode(spelled)
            offset += len(piece if is_stripped else piece.removeprefix(" "))
            is_stripped = is_stripped or bool(piece)
        elif (name := tokenizer.spelled(token_id).decode()) and text.startswith(name, offset):
            offset += len(name)
    return found


class Reporter:
    """Of one sample: keeps count of its characters."""

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        """`offset`: characters of the text before the sample's first."""
        self._tokenizer = tokenizer
        self._offset = offset
        self._decoder = _Utf8Decoder("replace")

    def read(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[ReportedToken]:
        """One entry for each token; call it with all of them, in order."""
        found = []
        for token_id, entry in zip(token_ids, logprobs, strict=True):
            found.append(_reported(self._tokenizer, token_id, entry, self._offset))
            self._offset += len(self._decoder.decode(self._tokenizer.bytes_of([token_id])))
        return found


def _reported(tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs, offset: int) -> ReportedToken:
    spell = tokenizer.spelled
    chosen = Likelihood(token_id, spell(token_id), entry.logprob, entry.rank)
    pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
    top = [Likelihood(other, spell(other), logprob, rank) for rank, (other, logprob) in enumerate(pairs, 1)]
    return ReportedToken(chosen, top, offset)
