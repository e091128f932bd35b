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
    """A token of an answer."""

    chosen: Likelihood
    top: list[Likelihood]  # the likeliest tokens, likeliest first; as many as were asked for
    offset: int  # characters of the text before it


class Reporter:
    """Of one sample: keeps count of its characters."""

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        """`offset`: characters of the text before the sample's first."""
        self._tokenizer = tokenizer
        self._offset = offset
        self._decoder = _Utf8Decoder("replace")

    def read(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[ReportedToken]:
        """One entry for each token; call it with all of them, in order."""
        return [self._read(token_id, entry) for token_id, entry in zip(token_ids, logprobs, strict=True)]

    def _read(self, token_id: int, entry: TokenLogprobs) -> ReportedToken:
        spell = self._tokenizer.spelled
        chosen = Likelihood(token_id, spell(token_id), entry.logprob, entry.rank)
        pairs = zip(entry.top_ids, entry.top_logprobs, strict=True)
        top = [Likelihood(other, spell(other), logprob, rank) for rank, (other, logprob) in enumerate(pairs, 1)]
        reported = ReportedToken(chosen, top, self._offset)
        self._offset += len(self._decoder.decode(self._tokenizer.bytes_of([token_id])))
        return reported
