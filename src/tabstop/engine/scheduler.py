"""Decides what the next step computes, and what its result means. Knows no device, socket, clock or text.

There are no prefill or decode modes: a step computes some more tokens of each running sample under one token budget
(chunked prompts mixed with decoding: Sarathi-Serve, OSDI 2024), over paged KV blocks (vLLM, SOSP 2023). Samples run in
order of class, then arrival. When blocks run out, the last sample in that order is preempted: its blocks are released
(they stay findable) and it is computed again later.
"""

from __future__ import annotations

import logging
from bisect import insort
from dataclasses import dataclass, field
from itertools import chain
from math import isfinite

from msgspec import structs

from tabstop.cache.blocks import Block, BlockPool, Match
from tabstop.engine.mix import Load, Mix
from tabstop.engine.plan import NO_TOKEN, PENDING, Copy, Row, StepPlan, StepResult, TableUpdate
from tabstop.engine.request import Request
from tabstop.errors import InternalError, TabstopError
from tabstop.types import Delta, EngineFailure, FinishReason, Ledger, Stage

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Flight:
    """A launched step that has not been updated yet."""

    requests: list[Request] = field(default_factory=list)  # of plan.rows
    holds: list[Block] = field(default_factory=list)  # sources of plan.copies


@dataclass(slots=True)
class Counters:
    """Totals since start; see types.Stats."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_overrun_tokens: int = 0
    aborts: dict[str, int] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Owns the waiting and running samples and their blocks.

    `schedule` and `update` are called in turn for the same sequence of plans; with overlap one plan may be scheduled
    before the previous one is updated.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, prefix_cache: bool) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_cache = prefix_cache
        self.waiting: list[Request] = []  # sorted by Request.order
        self.running: list[Request] = []  # sorted by Request.order
        self.counters = Counters()
        self.mix = Mix(max_num_seqs, max_num_batched_tokens, len(pool.blocks) * pool.block_size)
        self.step = 0
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._flights: dict[int, Flight] = {}
        self._deltas: list[Delta] = []

    # ---- the outside's verbs

    def add(self, request: Request) -> None:
        if not request.was_admitted:
            self.mix.see_request(request.num_prompt_tokens, request.limits.max_tokens)
        request.stage = Stage.WAITING
        insort(self.waiting, request, key=_order)

    def finish(self, request: Request, reason: FinishReason, failure: EngineFailure | None = None) -> None:
        """Ends a sample at any stage: its blocks are released and its terminal delta is queued."""
        delta = request.delta([], reason)
        delta.failure = failure
        self._end(request, delta)

    def take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def flying(self, step: int) -> list[Request]:
        """The requests of a launched plan's rows."""
        return self._flights[step].requests

    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._deltas)

    # ---- schedule: requests → plan

    def schedule(self) -> StepPlan:
        """What to compute next. Samples that need one token come first, so that no prompt makes a stream wait."""
        self.step += 1
        plan, flight = StepPlan(self.step), Flight()
        self._make_way()
        budget = self.max_num_batched_tokens
        singles: list[Request] = []
        others: list[Request] = []
        for request in self.running:
            num_left = request.num_left
            if num_left:
                (singles if num_left == 1 else others).append(request)
        most = self.mix.prompt_budget(self._load(singles, others))
        for group, limit in ((singles, budget), (others, most)):
            budget = min(budget, limit)
            for request in group:
                if budget and request.slot >= 0:  # not preempted meanwhile
                    budget -= self._advance(plan, flight, request, budget)
        while budget and self.waiting and (match := self._fit(self.waiting[0])):
            budget -= self._advance(plan, flight, self._admit(plan, flight, match), budget)
        if plan:
            self._flights[plan.step] = flight
        return plan

    def _load(self, singles: list[Request], others: list[Request]) -> Load:
        num_backlog = sum(request.num_left for request in others)
        return Load(len(singles), len(self.running) + len(self.waiting), num_backlog, len(self.waiting))

    def _advance(self, plan: StepPlan, flight: Flight, request: Request, budget: int) -> int:
        """Plans a row for as many of the request's next tokens as the budget allows; returns how many."""
        start = request.num_computed
        end = start + min(request.num_left, budget)
        if not self._grow(plan, request, end):
            return 0
        ids = request.tokens[start:end].tolist()
        if len(ids) < end - start:
            ids.append(PENDING)
        sample = end == request.num_tokens and request.limits.max_tokens > 0
        report = request.prompt_report(start, end)
        plan.rows.append(Row(request.slot, start, ids, sample, sample and bool(request.constraints), report))
        flight.requests.append(request)
        request.num_computed, request.last_step = end, self.step
        request.num_settled = start
        request.num_in_flight += sample
        if start < request.num_prompt_tokens:  # once: a block counts as written by the step that published it last
            self._publish(request, min(end, request.num_prompt_tokens))
        return end - start

    def _grow(self, plan: StepPlan, request: Request, num_tokens: int) -> bool:
        """Gives the request blocks for `num_tokens`, preempting from the end of the order; False if that hit itself."""
        while len(request.blocks) * self.pool.block_size < num_tokens:
            block = self.pool.allocate()
            if block is not None:
                request.blocks.append(block)
                continue
            victim = next(r for r in reversed(self.running) if r.last_step != self.step)
            self._preempt(victim)
            if victim is request:
                return False
        if new := request.blocks[request.num_blocks_sent :]:
            plan.tables.append(TableUpdate(request.slot, request.num_blocks_sent, [block.index for block in new]))
            request.num_blocks_sent = len(request.blocks)
        return True

    def _fit(self, request: Request) -> Match | None:
        """The cached start of a waiting request if it can be admitted now, else None.

        It must find blocks for all its tokens beside what the prompts already running still need: admitting it and
        preempting it a step later would waste the work.
        """
        if request.num_in_flight or not self._free_slots:
            return None
        match = self._match(request)
        pool = self.pool
        num_needed = self._num_blocks(request.num_tokens) - len(match.blocks)
        num_promised = sum(max(0, self._num_blocks(r.num_tokens) - len(r.blocks)) for r in self.running)
        num_available = pool.num_available - num_promised - sum(map(pool.is_cached, match.blocks))
        if match.partial and num_needed > num_available - pool.is_cached(match.partial):
            match.partial, match.num_partial = None, 0
        return match if num_needed <= num_available else None

    def _match(self, request: Request) -> Match:
        """What of the request's tokens is in memory: its parent's prompt for a fork, else what the cache finds.

        At least one token is left to compute, since its logits are wanted.
        """
        size, parent = self.pool.block_size, request.parent
        if parent is not None and parent.slot >= 0 and parent.admission_step < self.step:
            num_settled = parent.num_settled if parent.last_step == self.step else parent.num_computed
            num_whole, num_rest = divmod(min(request.num_prompt_tokens - 1, num_settled), size)
            rest = parent.blocks[num_whole] if num_rest else None
            return Match(parent.blocks[:num_whole], parent.keys[:num_whole], rest, num_rest)
        if not (self.prefix_cache and request.cache.read):
            return Match()
        return self.pool.find(request.root, request.tokens.tobytes(), len(request.tokens) - 1, self.step)

    def _admit(self, plan: StepPlan, flight: Flight, match: Match) -> Request:
        """The first waiting request takes a slot and the matched blocks."""
        request, slot = self.waiting.pop(0), self._free_slots.pop()
        for block in match.blocks:
            self.pool.share(block)
        request.slot, request.blocks, request.keys = slot, list(match.blocks), list(match.keys)
        request.admission_step = self.step
        request.num_computed = len(match.blocks) * self.pool.block_size + match.num_partial
        if match.partial:
            self.pool.hold(match.partial)
            flight.holds.append(match.partial)
            target = self.pool.allocate()
            assert target is not None, "_fit promised a block"
            request.blocks.append(target)
            plan.copies.append(Copy(match.partial.index, target.index, match.num_partial))
        plan.admissions.append(request.admission(slot))
        insort(self.running, request, key=_order)
        self._count_admission(request)
        return request

    def _count_admission(self, request: Request) -> None:
        request.stage = Stage.DECODING if request.num_output_tokens else Stage.PROMPT
        if request.was_admitted:
            return
        request.was_admitted = True
        if request.parent is not None:
            request.num_cached_tokens = request.parent.num_cached_tokens
            return
        request.num_cached_tokens = request.num_computed
        self.counters.num_prompt_tokens += request.num_prompt_tokens
        self.counters.num_cached_tokens += request.num_computed

    def _make_way(self) -> None:
        """Preempts samples of a lower class while the first waiting request does not fit beside them, if that helps."""
        if not self.waiting or self.waiting[0].num_in_flight:
            return
        head = self.waiting[0]
        lower = [request for request in self.running if request.priority > head.priority]
        num_blocks = self.pool.num_available + sum(len(request.blocks) for request in lower)
        if self._num_blocks(head.num_tokens) > num_blocks:
            return
        while lower and self._fit(head) is None:
            self._preempt(lower.pop())

    def _preempt(self, request: Request) -> None:
        """Back to waiting, to be recomputed; what it computed stays findable until evicted."""
        self.counters.num_preemptions += 1
        self._leave(request)
        self.add(request)

    # ---- update: result → deltas

    def update(self, plan: StepPlan, result: StepResult) -> None:
        """Takes a step's tokens. Rows whose sample ended meanwhile are dropped and counted as overrun."""
        flight = self._flights.pop(plan.step)
        for index, (row, request) in enumerate(zip(plan.rows, flight.requests, strict=True)):
            if request.is_finished:
                self.counters.num_overrun_tokens += len(result.tokens[index])
            else:
                self._land(index, row, request, result)
        for block in flight.holds:
            self.pool.unhold(block)

    def _land(self, index: int, row: Row, request: Request, result: StepResult) -> None:
        tokens, report = result.tokens[index], request.take_report(row, result.prompt_logprobs.get(index, []))
        request.num_in_flight -= row.sample
        finish, failure, kept = None, None, []
        for token_id in tokens:
            if token_id == NO_TOKEN:
                finish, failure = FinishReason.ERROR, self._disown(request)
                break
            request.tokens.append(token_id)
            kept.append(token_id)
            finish = request.finish_reason(token_id)
            if finish is not FinishReason.STOP:  # a stop token is no part of the text
                failure = _accept(request, token_id)
                is_complete = any(constraint.ended for constraint in request.constraints)
                finish = FinishReason.ERROR if failure else FinishReason.STOP if is_complete else finish
            if finish:
                break
        self.counters.num_generation_tokens += len(kept)
        self.counters.num_overrun_tokens += len(tokens) - len(kept)
        is_prompt_done = row.start + len(row.token_ids) >= request.num_prompt_tokens
        if is_prompt_done and request.limits.max_tokens == 0:
            finish = FinishReason.LENGTH
        if not all(isfinite(entry.logprob) for entry in report):
            finish, failure = FinishReason.ERROR, self._disown(request)
        if kept and request.stage is Stage.PROMPT:
            request.stage = Stage.DECODING
        if finish or kept or report:
            delta = request.delta(kept, finish)
            delta.failure, delta.prompt_logprobs = failure, report
            delta.logprobs = result.logprobs.get(index, [])[: len(kept)]
            if finish:
                self._end(request, delta)
            else:
                self._deltas.append(delta)
        if is_prompt_done:
            self._release_children(request)

    def _disown(self, request: Request) -> EngineFailure:
        """Lets nobody find what a model without numbers computed; why the sample must end."""
        self.pool.forget(request.blocks)
        request.cache = structs.replace(request.cache, write=False)
        log.error("the model computed no numbers (NaN or infinity) for a request; it ends, others go on")
        message = "the model computed no numbers (NaN or infinity) for this request; try another --dtype"
        return EngineFailure(InternalError.code, message)

    def _release_children(self, request: Request) -> None:
        for child in request.children:
            self.add(child)
        request.children = []

    # ---- endings

    def _end(self, request: Request, delta: Delta) -> None:
        assert not request.is_finished and delta.finish
        if delta.finish in (FinishReason.ABORT, FinishReason.SUPERSEDED):
            self.counters.aborts[request.stage] = self.counters.aborts.get(request.stage, 0) + 1
        self.counters.finished[delta.finish] = self.counters.finished.get(delta.finish, 0) + 1
        if delta.finish in (FinishReason.STOP, FinishReason.LENGTH):
            self.mix.see_answer(request.num_output_tokens)
        if request.slot >= 0:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        elif request.parent and request in request.parent.children:
            request.parent.children.remove(request)
        if request.stage is not Stage.COMPILING:
            self._release_children(request)
        request.stage = Stage.FINISHED
        self._deltas.append(delta)

    def _leave(self, request: Request) -> None:
        """Gives up the slot and the blocks, tails first; computed content stays findable."""
        self._publish(request, min(request.num_computed, len(request.tokens)))
        for block in reversed(request.blocks):
            self.pool.release(block)
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot, request.blocks, request.keys = -1, [], []
        request.num_computed = request.num_blocks_sent = 0

    def _publish(self, request: Request, num_tokens: int) -> None:
        """Makes the first `num_tokens` tokens of the request findable (those that were not yet)."""
        if not (self.prefix_cache and request.cache.write):
            return
        size, retain = self.pool.block_size, request.cache.retain
        for start in range(len(request.keys) * size, num_tokens, size):
            parent = request.keys[-1] if request.keys else request.root
            ids = request.tokens[start : min(start + size, num_tokens)].tobytes()
            key = self.pool.publish(request.blocks[start // size], parent, ids, request.last_step, retain)
            if key is not None:
                request.keys.append(key)

    # ---- accounts

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def ledger(self) -> Ledger:
        """Every token slot of the pool; see types.Ledger. Only a sequence's own last blocks can be unfilled."""
        num_slots = (self.pool.num_owned - self.pool.num_held) * self.pool.block_size
        num_waste = sum(len(r.blocks) * self.pool.block_size - r.num_computed for r in self.running)
        return self.pool.ledger(num_slots - num_waste, num_waste)

    def check(self) -> None:
        """Asserts every invariant by recounting. Slow; after every step in tests, when idle elsewhere."""
        self.pool.check()
        num_owners = [0] * len(self.pool.blocks)
        tables = [request.blocks for request in self.running]
        for block in chain(*tables, *(flight.holds for flight in self._flights.values())):
            num_owners[block.index] += 1
        assert num_owners == [block.num_owners for block in self.pool.blocks], "owners do not match tables and holds"
        ledger = self.ledger()
        parts = (ledger.used, ledger.waste, ledger.reserved, ledger.cached, ledger.free)
        assert min(parts) >= 0 and sum(parts) == ledger.total, ledger
        assert self.running == sorted(self.running, key=_order) and self.waiting == sorted(self.waiting, key=_order)
        assert len({r.slot for r in self.running} | set(self._free_slots)) == len(self.running) + len(self._free_slots)
        for request in self.running:
            assert 0 <= request.num_computed <= request.num_tokens
            assert len(request.blocks) >= self._num_blocks(request.num_computed)
        for request in self.waiting:
            assert not request.blocks and request.slot < 0 and request.num_computed == 0


def _accept(request: Request, token_id: int) -> EngineFailure | None:
    """Advances the request's constraints; why it must end, if one of them raises."""
    try:
        for constraint in request.constraints:
            constraint.accept(token_id)
    except Exception as error:
        return failure_of(error)
    request.constraints = [constraint for constraint in request.constraints if not constraint.released]
    return None


def failure_of(error: BaseException) -> EngineFailure:
    """Why a sample ends when one of its constraints raised."""
    if isinstance(error, TabstopError):
        return EngineFailure(error.code, error.message)
    log.error("a constraint failed", exc_info=error)
    return EngineFailure(InternalError.code, "a constraint of this request failed; the log says why")


def _order(request: Request) -> tuple[int, int, int]:
    return request.order
