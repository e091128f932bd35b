"""StepPlan → tensors. Knows slots, tables and positions; no model and no scheduling.

The plain loop's twin is in the tests; here everything after the first list is vectorised over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tabstop.attention import AttentionBatch
from tabstop.engine.plan import PENDING, LateInputs, StepPlan


@dataclass(slots=True)
class DeviceBatch:
    """One step's inputs: T tokens in R rows, N of which draw a token."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: AttentionBatch
    drawing_rows: list[int]  # [N] rows of the plan that draw
    last_tokens: Tensor  # int64 [N] index of their last token in T
    drawing_slots: np.ndarray  # int64 [N]
    drawing_positions: np.ndarray  # int64 [N] position of the token to draw


class SlotState:
    """What the device remembers of each running sequence between steps."""

    def __init__(self, max_num_seqs: int, max_num_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self.tables = np.zeros((max_num_seqs, max_num_blocks), np.int32)
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # last token drawn in each slot

    def make_batch(self, plan: StepPlan) -> DeviceBatch:
        """Applies the plan's table updates and lays its rows out one after the other."""
        for slot, first, blocks in plan.tables:
            self.tables[slot, first : first + len(blocks)] = blocks
        slots = np.array([row.slot for row in plan.rows])
        starts = np.array([row.start for row in plan.rows])
        lens = np.array([len(row.token_ids) for row in plan.rows])
        contexts = starts + lens
        ends = np.cumsum(lens)
        row_of_token = np.repeat(np.arange(len(lens)), lens)
        positions = np.arange(ends[-1]) - np.repeat(ends - lens - starts, lens)
        tables = self.tables[slots, : -(-int(contexts.max()) // self.block_size)]
        blocks_of_tokens = tables[row_of_token, positions // self.block_size].astype(np.int64)
        drawing = np.array([row.sample for row in plan.rows])
        attention = AttentionBatch(
            query_lens=lens.tolist(),
            context_lens=contexts.tolist(),
            query_starts=self._upload(np.concatenate([[0], ends]).astype(np.int32)),
            contexts=self._upload(contexts.astype(np.int32)),
            block_tables=self._upload(tables),
            kv_slots=self._upload(blocks_of_tokens * self.block_size + positions % self.block_size),
        )
        return DeviceBatch(
            ids=self._ids(plan, slots, ends),
            positions=self._upload(positions),
            attention=attention,
            drawing_rows=np.flatnonzero(drawing).tolist(),
            last_tokens=self._upload((ends - 1)[drawing]),
            drawing_slots=slots[drawing],
            drawing_positions=contexts[drawing],
        )

    def _ids(self, plan: StepPlan, slots: np.ndarray, ends: np.ndarray) -> Tensor:
        """The fed tokens; a row's PENDING last one is what its slot drew."""
        host = np.fromiter(chain.from_iterable(row.token_ids for row in plan.rows), np.int64, int(ends[-1]))
        ids = self._upload(host)
        pending = np.flatnonzero(host[ends - 1] == PENDING)
        if pending.size:
            ids[self._upload(ends[pending] - 1)] = self.last_ids[self._upload(slots[pending])]
        return ids

    def remember(self, batch: DeviceBatch, tokens: Tensor) -> None:
        """Keeps the drawn tokens, int64 [N], for rows that will feed them as PENDING."""
        self.last_ids[self._upload(batch.drawing_slots)] = tokens

    def _upload(self, host: np.ndarray) -> Tensor:
        return torch.from_numpy(host).to(self.device, non_blocking=True)


def pack_masks(batch: DeviceBatch, late: LateInputs, vocab_size: int) -> np.ndarray | None:
    """The masks of the drawing rows, int32 [N, words]; None when there are none."""
    if not late.masks:
        return None
    masks = np.full((len(batch.drawing_rows), -(-vocab_size // 32)), -1, np.int32)
    for place, row in enumerate(batch.drawing_rows):
        if row in late.masks:
            masks[place] = late.masks[row]
    return masks
