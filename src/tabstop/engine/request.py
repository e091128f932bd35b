"""One sample of a request, as the scheduler sees it: its tokens, how far they are computed, and what it owns."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from tabstop.cache.blocks import Block, root_key
from tabstop.engine.plan import Admission, PromptReport, Row
from tabstop.grammar import NO_IDS, Constraint
from tabstop.types import (
    CachePolicy,
    Delta,
    FinishReason,
    Limits,
    Priority,
    RequestId,
    Sampling,
    Stage,
    TokenLogprobs,
)


@dataclass(slots=True)
class PromptProgress:
    """How much of a prompt has been reported. A request's samples share one, so whichever computes a token reports it,
    and a sample that is computed again after a preemption says nothing twice.
    """

    num_reported: int = 1  # tokens; of the first nothing is known


@dataclass(slots=True, eq=False)
class Request:
    """One running or waiting sample. A request with n samples is n of these, forked from the first.

    0 ≤ num_computed ≤ num_tokens = len(tokens) + num_in_flight holds between steps.
    """

    # from Submit
    request_id: RequestId
    sample: int
    tokens: array[int]  # prompt + accepted output; uint32
    num_prompt_tokens: int
    sampling: Sampling
    limits: Limits
    stop_ids: frozenset[int]
    cache: CachePolicy
    priority: Priority
    arrival: int  # order of acceptance
    deadline: float | None  # on the clock of step(now)
    tenant: str = ""
    session: str = ""
    adapter: str = ""
    constraints: list[Constraint] = field(default_factory=list)
    progress: PromptProgress = field(default_factory=PromptProgress)

    # set by the scheduler
    stage: Stage = Stage.WAITING
    num_computed: int = 0  # tokens whose keys and values are computed, or will be by steps already launched
    num_in_flight: int = 0  # tokens that launched steps will sample
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    slot: int = -1  # place on the workers while running
    blocks: list[Block] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the leading blocks whose key is known (hashing is lazy)
    num_blocks_sent: int = 0  # leading blocks that the workers' table holds
    last_step: int = -1  # the newest step with a row of this request
    admission_step: int = -1  # the step that gave it its slot
    num_settled: int = 0  # tokens whose keys and values lay in its blocks before its newest row's step
    parent: Request | None = None  # the sample to fork from
    children: list[Request] = field(default_factory=list)  # samples that wait for this one's prompt
    was_admitted: bool = False

    @property
    def order(self) -> tuple[int, int, int]:
        """Scheduling order: class, then first come first served."""
        return (self.priority, self.arrival, self.sample)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_left(self) -> int:
        """Tokens to compute next; 0 when everything that may be computed is in flight."""
        num_sampled = self.num_output_tokens + self.num_in_flight
        if num_sampled and num_sampled >= self.limits.max_tokens:
            return 0
        return self.num_tokens - self.num_computed

    @property
    def ends(self) -> np.ndarray:
        """int64: the tokens that would end it now."""
        if self.num_output_tokens < self.limits.min_tokens or not self.stop_ids:
            return NO_IDS
        return np.fromiter(self.stop_ids, np.int64, len(self.stop_ids))

    @property
    def is_finished(self) -> bool:
        return self.stage is Stage.FINISHED

    @property
    def root(self) -> bytes:
        return root_key(self.cache.scope)

    def admission(self, slot: int) -> Admission:
        """What workers must know to draw for it. All of its tokens are known: a sample in flight is not admitted."""
        history = self.tokens[:] if self.sampling.looks_back else None
        least = self.limits.min_tokens
        stops = self.stop_ids if least else frozenset()
        return Admission(slot, self.sampling, self.sample, self.num_prompt_tokens, history, least, stops)

    def prompt_report(self, start: int, end: int) -> PromptReport | None:
        """What a row of the tokens from `start` to `end` shall say of the prompt."""
        num_top = self.sampling.num_prompt_logprobs
        if num_top is None:
            return None
        first, last = max(start, self.progress.num_reported - 1), min(end, self.num_prompt_tokens - 1)
        return (
            PromptReport(first - start, self.tokens[first + 1 : last + 1].tolist(), num_top) if first < last else None
        )

    def take_report(self, row: Row, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Of what a row says of the prompt, what nobody has said yet."""
        if row.report is None:
            return []
        progress, position = self.progress, row.start + row.report.first + 1
        assert position <= progress.num_reported, "a part of the prompt was left out"
        new = logprobs[progress.num_reported - position :]
        progress.num_reported += len(new)
        return new

    def finish_reason(self, token_id: int) -> FinishReason | None:
        """Whether the token just appended ends the sample, by ids and counts alone."""
        if token_id in self.stop_ids and self.num_output_tokens > self.limits.min_tokens:
            return FinishReason.STOP
        if self.num_output_tokens >= self.limits.max_tokens:
            return FinishReason.LENGTH
        return None

    def delta(self, token_ids: list[int], finish: FinishReason | None = None) -> Delta:
        is_stop = finish is FinishReason.STOP and token_ids and token_ids[-1] in self.stop_ids
        stop = token_ids[-1] if is_stop else None  # else a constraint is complete
        return Delta(self.request_id, self.sample, token_ids, finish, stop, self.num_cached_tokens)
