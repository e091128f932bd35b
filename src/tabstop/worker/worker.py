"""One rank: the model, its KV memory and its sampler. Does what a plan says and decides nothing.

Everything is queued on the device and nothing waits for it; `Drawn.tokens` does, when the engine asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tabstop.attention import AttentionBackend
from tabstop.engine.plan import LateInputs, StepPlan, StepResult
from tabstop.models import Model, StepContext
from tabstop.sampling.sampler import Sampler
from tabstop.worker.batch import Buffer, Drawing, SlotState, StepInputs, pack_masks


@dataclass(slots=True)
class Drawn:
    """Tokens on their way from the device."""

    drawing: Drawing
    tokens: Tensor  # int64 [N] on the host, valid after `ready`
    ready: torch.cuda.Event | None

    def result(self, plan: StepPlan) -> StepResult:
        """Waits for the device."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens: list[list[int]] = [[] for _ in plan.rows]
        for row, token_id in zip(self.drawing.rows.tolist(), self.tokens.tolist(), strict=True):
            tokens[row] = [token_id]
        return StepResult(tokens)


class Worker:
    """Runs plans in two halves, since a mask may come late: `forward` and `sample`."""

    def __init__(self, model: Model, attention: AttentionBackend, kv: list[Any], state: SlotState) -> None:
        self.model = model
        self.attention = attention
        self.kv = kv  # one per layer, in the backend's layout
        self.state = state
        self.sampler = Sampler(len(state.tables))

    @property
    def device(self) -> torch.device:
        return self.state.device

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[Drawing, Tensor]:
        """Copies blocks, then computes the plan's rows; returns float32 logits [N, vocab] of the drawing rows."""
        self.sampler.admit(plan.admissions)
        self.state.apply_tables(plan)
        for source, target, num_tokens in plan.copies:
            for kv in self.kv:
                self.attention.copy(kv, source, target, num_tokens)
        buffer = Buffer(self.state.exact_shape(plan), self.device)
        inputs, drawing = self.state.fill(plan, buffer)
        hidden = self.run_model(inputs)
        last = inputs.last_tokens
        if len(drawing.rows) < len(plan.rows):
            last = last[self.state.upload(drawing.rows)]
        return drawing, self.model.logits(hidden[last])

    def run_model(self, inputs: StepInputs) -> Tensor:
        context = StepContext(self.attention, self.attention.plan(inputs.attention), self.kv)
        return self.model.forward(inputs.ids, inputs.positions, context)

    @torch.inference_mode()
    def sample(self, drawing: Drawing, logits: Tensor, late: LateInputs) -> Drawn:
        if not len(drawing.rows):
            return Drawn(drawing, torch.empty(0, dtype=torch.int64), None)
        masks = pack_masks(drawing, late, self.model.vocab_size)
        tokens = self.sampler.sample(logits, drawing.slots, drawing.positions, masks)
        self.state.remember(drawing, tokens)
        if self.device.type == "cpu":
            return Drawn(drawing, tokens, None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Drawn(drawing, host, ready)
