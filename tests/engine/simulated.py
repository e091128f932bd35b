"""Workers without a model whose every token depends on all of the KV memory that it should depend on.

A KV slot holds a mix of (token id, position). A drawn token is a mix of everything that its context's slots hold, read
through the block table; so a wrong slot, a stale block, a missing copy or a block reused too early changes the output.
`expected_output` is the same function over plain lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tabstop.cache.blocks import BlockPool
from tabstop.engine.core import EngineCore
from tabstop.engine.plan import PENDING, LateInputs, StepPlan, StepResult
from tabstop.engine.scheduler import Scheduler
from tabstop.sampling.random import _mix, uniform
from tabstop.types import EngineInfo, Sampling, TokenLogprobs

VOCAB = 97


def kv_value(token_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _mix(token_ids.astype(np.uint64) * np.uint64(1_000_003) + positions.astype(np.uint64) + np.uint64(1))


def next_token(context: np.ndarray, sampling: Sampling, candidate: int, position: int) -> int:
    """The token drawn after the KV values of a whole context, uint64 [n]."""
    with np.errstate(over="ignore"):
        state = context.sum(dtype=np.uint64)
        if sampling.temperature > 0:
            arguments = (np.array([value], np.uint64) for value in (sampling.seed, candidate, position))
            state = state + np.uint64(uniform(*arguments)[0] * 2**32)
        return int(_mix(np.array([state], np.uint64))[0] % np.uint64(VOCAB))


def expected_output(
    prompt: list[int], num_tokens: int, sampling: Sampling, candidate: int = 0, stop_ids: frozenset[int] = frozenset()
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < num_tokens:
        context = kv_value(np.array(tokens), np.arange(len(tokens)))
        tokens.append(next_token(context, sampling, candidate, len(tokens)))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def prompt_entry(context: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    """What is "thought" of a token after the KV values of all tokens before it."""
    with np.errstate(over="ignore"):
        digest = int(_mix(np.array([context.sum(dtype=np.uint64)], np.uint64))[0] % np.uint64(10_007))
    return TokenLogprobs(-float(digest), token_id, list(range(num_top)), [0.0] * num_top)


def expected_prompt(prompt: list[int], num_top: int) -> list[TokenLogprobs]:
    values = kv_value(np.array(prompt), np.arange(len(prompt)))
    return [prompt_entry(values[:at], prompt[at], num_top) for at in range(1, len(prompt))]


@dataclass
class SimulatedStep:
    workers: SimulatedWorkers
    plan: StepPlan
    contexts: list[np.ndarray]
    result: StepResult | None = None

    def sample(self, late: LateInputs) -> None:
        self.result = self.workers.sample(self.plan, self.contexts, late)

    def wait(self) -> tuple[StepPlan, StepResult]:
        assert self.result is not None, "wait before sample"
        return self.plan, self.result


@dataclass
class SimulatedWorkers:
    num_blocks: int
    block_size: int
    num_computed_tokens: int = 0
    plans: list[StepPlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = np.zeros((self.num_blocks, self.block_size), np.uint64)
        self.tables: dict[int, list[int]] = {}
        self.admissions: dict[int, tuple[Sampling, int]] = {}
        self.last: dict[int, int] = {}

    def launch(self, plan: StepPlan) -> SimulatedStep:
        self.plans.append(plan)
        for slot, sampling, candidate, *_ in plan.admissions:
            self.admissions[slot] = (sampling, candidate)
            self.last.pop(slot, None)
        for slot, first, blocks in plan.tables:
            table = self.tables.setdefault(slot, [])
            table[first:] = blocks
        self._check_copies(plan)
        for source, target, num_tokens in plan.copies:
            self.memory[target, :num_tokens] = self.memory[source, :num_tokens]
        for row in plan.rows:
            self._store(row)
        return SimulatedStep(self, plan, [self._context(row) for row in plan.rows])

    def _check_copies(self, plan: StepPlan) -> None:
        """A device may run copies in any order, and beside the forward's writes to other slots."""
        targets = [copy.target for copy in plan.copies]
        written = {
            (self.tables[row.slot][position // self.block_size], position % self.block_size)
            for row in plan.rows
            for position in range(row.start, row.start + len(row.token_ids))
        }
        for source, _, num_tokens in plan.copies:
            assert source not in targets, "a copy's source is overwritten by another copy"
            assert not any((source, offset) in written for offset in range(num_tokens)), "... by the forward"
        assert len(set(targets)) == len(targets)

    def _store(self, row) -> None:
        ids = [self.last[row.slot] if token == PENDING else token for token in row.token_ids]
        positions = np.arange(row.start, row.start + len(ids))
        for position, value in zip(positions, kv_value(np.array(ids), positions), strict=True):
            block = self.tables[row.slot][position // self.block_size]
            self.memory[block, position % self.block_size] = value
        self.num_computed_tokens += len(ids)

    def _context(self, row) -> np.ndarray:
        return self.memory[self.tables[row.slot]].reshape(-1)[: row.start + len(row.token_ids)].copy()

    def _prompts(self, plan: StepPlan, contexts: list[np.ndarray]) -> dict[int, list[TokenLogprobs]]:
        return {
            index: [
                prompt_entry(context[: row.start + at + 1], token_id, row.report.num_top)
                for at, token_id in enumerate(row.report.next_ids, row.report.first)
            ]
            for index, (row, context) in enumerate(zip(plan.rows, contexts, strict=True))
            if row.report
        }

    def sample(self, plan: StepPlan, contexts: list[np.ndarray], late: LateInputs) -> StepResult:
        tokens = []
        for index, (row, context) in enumerate(zip(plan.rows, contexts, strict=True)):
            if not row.sample:
                tokens.append([])
                continue
            token = next_token(context, *self.admissions[row.slot], len(context))
            if index in late.masks:
                bits = np.unpackbits(late.masks[index].view(np.uint8), bitorder="little")[:VOCAB]
                allowed = np.flatnonzero(bits)
                token = int(allowed[np.searchsorted(allowed, token) % len(allowed)])
            self.last[row.slot] = token
            tokens.append([token])
        return StepResult(tokens, prompt_logprobs=self._prompts(plan, contexts))

    def close(self) -> None:
        pass


class InlineExecutor:
    """Compiles constraints at once, so that schedules are reproducible."""

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_) -> None:
        pass


def make_core(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 128,
    overlap: bool = False,
    prefix_cache: bool = True,
    max_num_waiting: int = 1024,
    compiler=None,
) -> EngineCore:
    workers = SimulatedWorkers(num_blocks, block_size)
    info = EngineInfo(
        model="simulated",
        architecture="simulated",
        max_model_len=min(max_model_len, num_blocks * block_size),
        vocab_size=VOCAB,
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
    )
    scheduler = Scheduler(BlockPool(num_blocks, block_size), max_num_seqs, max_num_batched_tokens, prefix_cache)
    return EngineCore(
        info,
        scheduler,
        workers,
        compiler or InlineExecutor(),
        stop_sets={"eos": frozenset({0}), "newline": frozenset({1, 2})},
        max_num_waiting=max_num_waiting,
        overlap=overlap,
    )
