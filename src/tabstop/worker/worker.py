"""One rank: the model, its KV memory and its sampler. Does what a plan says and decides nothing.

Everything is queued on the device and nothing waits for it; `Drawn.tokens` does, when the engine asks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tabstop.attention import AttentionBackend
from tabstop.engine.plan import NO_TOKEN, Admission, Copy, LateInputs, Row, StepPlan, StepResult, TableUpdate
from tabstop.kernels import feed
from tabstop.kernels.language import rehearsal
from tabstop.kernels.likeliest import keep_triton
from tabstop.kernels.sample import draw
from tabstop.models import Model, StepContext
from tabstop.sampling.logprobs import Reported, report
from tabstop.sampling.sampler import Sampler
from tabstop.types import Sampling
from tabstop.worker.batch import Buffer, Drawing, PromptTokens, SlotState, StepInputs, pack_masks, prompt_tokens

if TYPE_CHECKING:
    from tabstop.worker.graphs import StepGraphs

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Forwarded:
    """What a forward leaves on the device, until the next one."""

    drawing: Drawing
    logits: Tensor  # float32 [N, vocab]; behind a graph those of all rows, [R, vocab]
    tokens: Tensor | None = None  # int64 [R] drawn (or NO_TOKEN) and remembered already behind a graph
    prompt: Reported | None = None  # of the plan's prompts, by row, where that was asked for


@dataclass(slots=True)
class Drawn:
    """Tokens on the device, or on their way from it."""

    rows: np.ndarray  # int64 [N] the plan's rows that draw
    places: np.ndarray  # int64 [N] where their tokens are
    tokens: Tensor  # int64, valid on the host after `ready`
    ready: torch.cuda.Event | None  # None: there is nothing to wait for
    reported: Reported | None = None  # of some of them, on the host, valid after `ready`
    prompt: Reported | None = None  # as in Forwarded, on the host, valid after `ready`

    def to_host(self) -> None:
        """Queues the copies."""
        self.tokens = _to_host(self.tokens)
        for reported in (self.reported, self.prompt):
            if reported is not None:
                reported.floats, reported.ids = _to_host(reported.floats), _to_host(reported.ids)
        self.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.ready.record()

    def result(self, plan: StepPlan) -> StepResult:
        """Waits for the device."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens: list[list[int]] = [[] for _ in plan.rows]
        drawn = self.tokens.numpy()[self.places]
        for row, token_id in zip(self.rows.tolist(), drawn.tolist(), strict=True):
            tokens[row] = [token_id]
        found = self.reported.entries() if self.reported else {}
        logprobs = {int(self.rows[row]): entries for row, entries in found.items()}
        return StepResult(tokens, logprobs, self.prompt.entries() if self.prompt else {})


class Worker:
    """Runs plans in two halves, since a mask may come late: `forward` and `sample`."""

    def __init__(self, model: Model, attention: AttentionBackend, kv: list[Any], state: SlotState) -> None:
        self.model = model
        self.attention = attention
        self.kv = kv  # one per layer, in the backend's layout
        self.state = state
        self.sampler = Sampler(len(state.tables), state.device)
        self._graphs: StepGraphs | None = None

    @property
    def device(self) -> torch.device:
        return self.state.device

    @torch.inference_mode()
    def capture_graphs(self, num_tokens: int) -> None:
        """From now on, steps of up to `num_tokens` replay graphs (worker/graphs.py)."""
        self._graphs = self._make_graphs()
        self._graphs.capture_all(num_tokens)

    def _make_graphs(self) -> StepGraphs:
        from tabstop.worker.graphs import StepGraphs

        return StepGraphs(self._step, self.state, self.sampler.numbers)

    @torch.inference_mode()
    def compile_kernels(self, num_tokens: int, num_threads: int) -> None:
        """Those of graphs of steps of up to `num_tokens`, side by side; others are compiled where they first run."""
        try:
            graphs = self._make_graphs()
            with rehearsal(num_threads):
                graphs.rehearse(self._rehearse, num_tokens)
        except Exception:  # a start must not fail for what only shortens it
            log.warning("kernels are compiled one after the other, since this went wrong", exc_info=True)

    def _rehearse(self, inputs: StepInputs) -> None:
        """As `_step`, and top-p, but no index depends on what a kernel did not compute; the results are of no use."""
        feed.known_ids(inputs.ids, self.state.last_ids)
        inputs.has_unknown = False
        logits = self.model.logits(self._hidden(inputs)[inputs.last_tokens])
        draw(logits, inputs.temperature, inputs.uniform)
        top_k, top_p = inputs.temperature.int(), inputs.temperature.double()
        keep_triton(logits, inputs.slots, inputs.temperature, top_k, top_p)
        self.attention.copy(self.kv, [Copy(0, 1, 1)])

    @torch.inference_mode()
    def measure_graphs(self, num_tokens: int) -> int:
        """Bytes that graphs of steps of up to `num_tokens` keep. Overwrites the cache; for start-up."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graphs = self._make_graphs()
        graphs.capture_largest(num_tokens)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() - before

    def measure_peak(self, num_tokens: int) -> int:
        """Bytes that the largest step takes beside weights and KV memory: all slots draw, one has the longest chunk.

        Overwrites the cache; for start-up.
        """
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        num_slots, num_blocks = self.state.tables.shape
        chunk = min(num_tokens - num_slots + 1, num_blocks * self.state.block_size)
        plan = self._plan_of([chunk] + [1] * (num_slots - 1))
        self.sample(self.forward(plan), LateInputs()).result(plan)
        self.attention.copy(self.kv, [Copy(0, 1, 1)])  # its kernel shall be compiled by now, too
        return torch.cuda.max_memory_allocated() - before

    def warm_up(self, num_tokens: int) -> None:
        """Runs chunks of all magnitudes up to `num_tokens`, alone and beside rows of one token: kernels are compiled
        and libraries choose their algorithms here, so that no request waits for them.
        """
        num_slots, num_blocks = self.state.tables.shape
        for num_others in sorted({0, min(7, num_slots - 1), num_slots - 1}, reverse=True):  # later ones reuse memory
            length = 1
            while length <= min(num_tokens - num_others, num_blocks * self.state.block_size):
                plan = self._plan_of([length] + [1] * num_others)
                self.sample(self.forward(plan), LateInputs()).result(plan)
                length *= 2

    def _plan_of(self, lengths: list[int]) -> StepPlan:
        """A step of rows with these many tokens, all of which draw; they share the first blocks."""
        plan = StepPlan(0)
        for slot, length in enumerate(lengths):
            plan.admissions.append(Admission(slot, Sampling(temperature=1.0, top_p=0.9), 0))
            plan.tables.append(TableUpdate(slot, 0, list(range(-(-length // self.state.block_size)))))
            plan.rows.append(Row(slot, 0, [0] * length, sample=True))
        return plan

    def _step(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """A whole step on the device: every row draws, and those of a sequence that shall are remembered.

        The tokens, as `_without_nonsense` has them; what is remembered is always one of the vocabulary.
        """
        logits = self.model.logits(self._hidden(inputs)[inputs.last_tokens])
        tokens = draw(logits, inputs.temperature, inputs.uniform)
        self.state.last_ids.index_copy_(0, inputs.slots, tokens)
        return logits, _without_nonsense(logits, tokens)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Forwarded:
        """Copies blocks, then computes the plan's rows."""
        self.sampler.admit(plan.admissions)
        self.state.apply_tables(plan)
        if plan.copies:
            self.attention.copy(self.kv, plan.copies)
        wanted = prompt_tokens(plan)  # graphs keep no hidden states
        if self._graphs is not None and wanted is None and (captured := self._graphs.find(plan)):
            return Forwarded(*self._graphs.replay(plan, captured))
        inputs, drawing = self.state.fill(plan, Buffer(self.state.exact_shape(plan), self.device))
        hidden, last = self._hidden(inputs), inputs.last_tokens
        if len(drawing.rows) < len(plan.rows):
            last = last[self.state.upload(drawing.rows)]
        prompt = None if wanted is None else self._report_prompt(hidden, wanted)
        return Forwarded(drawing, self.model.logits(hidden[last]), prompt=prompt)

    def _report_prompt(self, hidden: Tensor, wanted: PromptTokens) -> Reported:
        """What the model thinks of prompts' tokens, slice by slice of the hidden states [T, hidden] before them."""
        places, ids = self.state.upload(wanted.places), self.state.upload(wanted.ids)
        found = report(lambda some: self.model.logits(hidden[some]), places, ids, int(wanted.wanted.max()))
        return Reported(wanted.rows, wanted.wanted, *found)

    def _hidden(self, inputs: StepInputs) -> Tensor:
        context = StepContext(self.attention, self.attention.plan(inputs.attention), self.kv)
        return self.model.forward(self.state.known_ids(inputs), inputs.positions, context)

    @torch.inference_mode()
    def sample(self, forwarded: Forwarded, late: LateInputs) -> Drawn:
        rows = forwarded.drawing.rows
        drawn = Drawn(rows, np.arange(len(rows)), torch.empty(0, dtype=torch.int64), None, None, forwarded.prompt)
        if len(rows):
            self._draw(forwarded, late, drawn)
        if self.device.type == "cuda" and (len(rows) or drawn.prompt):
            drawn.to_host()
        return drawn

    def _draw(self, forwarded: Forwarded, late: LateInputs, drawn: Drawn) -> None:
        """Fills in `places`, `tokens` and `reported`."""
        drawing, logits, rows = forwarded.drawing, forwarded.logits, drawn.rows
        masks = pack_masks(drawing, late, self.model.vocab_size)
        is_plain = masks is None and self.sampler.takes_logits_as_they_are(drawing.slots, drawing.positions)
        if forwarded.tokens is not None and is_plain:
            drawn.tokens, drawn.places = forwarded.tokens, rows
        else:
            if len(rows) < len(logits):
                logits = logits[self.state.upload(rows)]
            tokens = self.sampler.sample(logits, drawing.slots, drawing.positions, masks)
            self.state.remember(drawing, tokens)
            drawn.tokens = _without_nonsense(logits, tokens)
        drawn.reported = self.sampler.report(logits, drawn.tokens, drawing.slots, drawn.places)


def _without_nonsense(logits: Tensor, tokens: Tensor) -> Tensor:
    """NO_TOKEN where the model computed no number: float32 [R, vocab], int64 [R] → int64 [R].

    A hidden state with a NaN or an infinity in it leaves none of its logits a number, so the drawn token's tells.
    """
    own = logits.gather(1, tokens[:, None])[:, 0]
    return torch.where(own.isfinite(), tokens, NO_TOKEN)


def _to_host(tensor: Tensor) -> Tensor:
    """Queued; valid after an event that is recorded later."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
