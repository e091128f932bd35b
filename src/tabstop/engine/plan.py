"""What the scheduler tells the workers and what they answer: plain data, broadcast once, decided by nobody else.

A plan does not know modes: each row computes the next `len(token_ids)` tokens of the sequence in a slot, be it a chunk
of its prompt or one token. A slot is a place for one running sequence on every worker: its sampling parameters, block
table and last sampled token live there, so a plan carries only what changed.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tabstop.types import Sampling, TokenLogprobs

PENDING = -1
"""In Row.token_ids: the token that the slot sampled last and that the host may not know yet."""

NO_TOKEN = -2
"""In StepResult.tokens: nothing could be drawn, since the logits were no numbers (NaN) or infinite."""


class Admission(NamedTuple):
    """A sequence takes a slot. Its former owner's state there is void."""

    slot: int
    sampling: Sampling
    candidate: int  # index among the request's samples; enters the random number of a draw
    num_prompt_tokens: int = 0
    history: array[int] | None = None  # its tokens so far, prompt and output, where its sampling looks back
    min_tokens: int = 0  # so many come before one of stop_ids
    stop_ids: frozenset[int] = frozenset()  # empty where min_tokens asks for nothing


class TableUpdate(NamedTuple):
    """Blocks appended to a slot's block table; `first` = 0 starts it anew."""

    slot: int
    first: int
    blocks: list[int]


class Copy(NamedTuple):
    """The first `num_tokens` slots of a KV block copied into another, in every layer, before the forward."""

    source: int
    target: int
    num_tokens: int


class PromptReport(NamedTuple):
    """Of which tokens of a row the successors' log-probabilities are wanted: of those from `first` on, one each."""

    first: int  # index in Row.token_ids
    next_ids: list[int]  # what came after each of them in the prompt
    num_top: int  # likeliest tokens beside each


class Row(NamedTuple):
    """The next tokens of one sequence."""

    slot: int
    start: int  # position of token_ids[0]
    token_ids: list[int]  # may end in PENDING
    sample: bool  # draw a token after the last one
    constrained: bool = False  # the draw waits for a mask (LateInputs)
    report: PromptReport | None = None


@dataclass(slots=True)
class StepPlan:
    """Filled by the scheduler; read by every worker in this order: admissions, tables, copies, rows."""

    step: int
    admissions: list[Admission] = field(default_factory=list)
    tables: list[TableUpdate] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)


@dataclass(slots=True)
class LateInputs:
    """What only the last step's tokens tell: bitmasks of allowed tokens, by row index.

    A mask is int32 [ceil(vocab_size / 32)], bit t % 32 of word t // 32 set when token t is allowed.
    """

    masks: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(slots=True)
class StepResult:
    """What a step sampled: per row of the plan the accepted tokens (none for a row that only computed)."""

    tokens: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by row, of its tokens, where asked for
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # by row, of its report's next_ids
