"""One rank: the model, its KV memory and its sampler. Does what a plan says and decides nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tabstop.attention import AttentionBackend
from tabstop.engine.plan import LateInputs, StepPlan, StepResult
from tabstop.models import Model, StepContext
from tabstop.sampling.sampler import Sampler
from tabstop.worker.batch import DeviceBatch, SlotState, pack_masks


class Worker:
    """Runs plans in two halves, since a mask may come late: `forward` and `sample`."""

    def __init__(self, model: Model, attention: AttentionBackend, kv: list[Any], state: SlotState) -> None:
        self.model = model
        self.attention = attention
        self.kv = kv  # one per layer, in the backend's layout
        self.state = state
        self.sampler = Sampler(len(state.tables))

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[DeviceBatch, Tensor]:
        """Copies blocks, then computes the plan's rows; returns float32 logits [N, vocab] of the drawing rows."""
        self.sampler.admit(plan.admissions)
        for source, target, num_tokens in plan.copies:
            for kv in self.kv:
                self.attention.copy(kv, source, target, num_tokens)
        batch = self.state.make_batch(plan)
        context = StepContext(self.attention, self.attention.plan(batch.attention), self.kv)
        hidden = self.model.forward(batch.ids, batch.positions, context)
        return batch, self.model.logits(hidden[batch.last_tokens])

    @torch.inference_mode()
    def sample(self, plan: StepPlan, batch: DeviceBatch, logits: Tensor, late: LateInputs) -> StepResult:
        tokens: list[list[int]] = [[] for _ in plan.rows]
        if batch.drawing_rows:
            masks = pack_masks(batch, late, self.model.vocab_size)
            drawn = self.sampler.sample(logits, batch.drawing_slots, batch.drawing_positions, masks)
            self.state.remember(batch, drawn)
            for row, token_id in zip(batch.drawing_rows, drawn.tolist(), strict=True):
                tokens[row] = [token_id]
        return StepResult(tokens)
