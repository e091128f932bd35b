"""StepPlan → tensors. Knows slots, tables and positions; no model and no scheduling.

All integers of a step lie in one host buffer, so a device needs one copy. A batch may be padded to a bucket's shape, so
that a captured graph can serve it: surplus tokens write their keys and values to a scratch block that no table holds,
surplus rows have no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tabstop.attention import AttentionBatch
from tabstop.engine.plan import PENDING, LateInputs, StepPlan

HostViews = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a batch: exact, or those of the bucket that it is padded to."""

    num_tokens: int
    num_rows: int
    num_blocks: int  # columns of the block tables


@dataclass(slots=True)
class StepInputs:
    """One step's device tensors: T tokens in R rows. Rows that draw nothing have a last token all the same."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    last_tokens: Tensor  # int64 [R] index of each row's last token in T
    attention: AttentionBatch


@dataclass(slots=True)
class Drawing:
    """Which rows of a plan draw a token, on the host; N of them."""

    rows: np.ndarray  # int64 [N] their index in the plan
    slots: np.ndarray  # int64 [N]
    positions: np.ndarray  # int64 [N] of the token to draw


class Buffer:
    """Host and device memory of one batch shape, and typed views of both."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        tokens, rows = shape.num_tokens, shape.num_rows
        wide = {"ids": tokens, "positions": tokens, "kv_slots": tokens, "last_tokens": rows}
        narrow = {"query_starts": rows + 1, "contexts": rows, "tables": rows * shape.num_blocks}
        self._wide = sum(wide.values())
        self._narrow = sum(narrow.values())
        num_bytes = 8 * self._wide + 4 * self._narrow
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._device = self._host if device.type == "cpu" else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.host = {name: view.numpy() for name, view in self._views(self._host, wide, narrow).items()}
        self.device = self._views(self._device, wide, narrow)
        self._uploaded = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _views(self, memory: Tensor, wide: dict[str, int], narrow: dict[str, int]) -> dict[str, Tensor]:
        longs = torch.split(memory[: 8 * self._wide].view(torch.int64), list(wide.values()))
        ints = torch.split(memory[8 * self._wide :].view(torch.int32), list(narrow.values()))
        views = dict(zip(wide, longs, strict=True)) | dict(zip(narrow, ints, strict=True))
        views["tables"] = views["tables"].view(self.shape.num_rows, self.shape.num_blocks)
        return views

    def wait(self) -> None:
        """Until the host memory may be written again."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def upload(self) -> None:
        if self._uploaded is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._uploaded.record()


class SlotState:
    """What is remembered of each running sequence between steps."""

    def __init__(
        self, max_num_seqs: int, max_num_blocks: int, block_size: int, scratch_block: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.scratch_block = scratch_block  # belongs to nobody
        self.device = device
        self.tables = np.zeros((max_num_seqs, max_num_blocks), np.int32)
        self.last_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # last token drawn in each slot

    def exact_shape(self, plan: StepPlan) -> Shape:
        """No padding."""
        longest = max(row.start + len(row.token_ids) for row in plan.rows)
        return Shape(plan.num_tokens, len(plan.rows), -(-longest // self.block_size))

    def apply_tables(self, plan: StepPlan) -> None:
        for slot, first, blocks in plan.tables:
            self.tables[slot, first : first + len(blocks)] = blocks

    def fill(self, plan: StepPlan, buffer: Buffer) -> tuple[StepInputs, Drawing]:
        """Lays the plan's rows out one after the other in the buffer, and uploads it."""
        buffer.wait()
        host, device = buffer.host, buffer.device
        slots = np.array([row.slot for row in plan.rows])
        starts = np.array([row.start for row in plan.rows])
        lens = np.array([len(row.token_ids) for row in plan.rows])
        contexts, ends = starts + lens, np.cumsum(lens)
        self._fill_tokens(host, slots, contexts - ends, lens)
        ids = np.fromiter(chain.from_iterable(row.token_ids for row in plan.rows), np.int64, int(ends[-1]))
        pending = np.flatnonzero(ids[ends - 1] == PENDING)
        _pad(host["ids"], np.maximum(ids, 0), 0)
        _pad(host["last_tokens"], ends - 1, 0)
        host["query_starts"][0] = 0
        _pad(host["query_starts"][1:], ends, int(ends[-1]))
        _pad(host["contexts"], contexts, 0)
        host["tables"][: len(slots)] = self.tables[slots, : buffer.shape.num_blocks]
        buffer.upload()
        self._fill_pending(device["ids"], ends[pending] - 1, slots[pending])
        attention = AttentionBatch(
            query_lens=lens.tolist(),
            context_lens=contexts.tolist(),
            query_starts=device["query_starts"],
            contexts=device["contexts"],
            block_tables=device["tables"],
            kv_slots=device["kv_slots"],
        )
        inputs = StepInputs(device["ids"], device["positions"], device["last_tokens"], attention)
        rows = np.flatnonzero(np.array([row.sample for row in plan.rows]))
        return inputs, Drawing(rows, slots[rows], contexts[rows])

    def _fill_tokens(
        self, host: dict[str, np.ndarray], slots: np.ndarray, shifts: np.ndarray, lens: np.ndarray
    ) -> None:
        """Each token's position (its index plus its row's shift) and the KV slot that its row's table gives it."""
        positions = np.arange(lens.sum()) + np.repeat(shifts, lens)
        blocks = self.tables[np.repeat(slots, lens), positions // self.block_size].astype(np.int64)
        _pad(host["positions"], positions, 0)
        kv_slots = blocks * self.block_size + positions % self.block_size
        _pad(host["kv_slots"], kv_slots, self.scratch_block * self.block_size)

    def _fill_pending(self, ids: Tensor, places: np.ndarray, slots: np.ndarray) -> None:
        """Where the host does not know a row's last token, the slot does."""
        if places.size:
            ids[self.upload(places)] = self.last_ids[self.upload(slots)]

    def remember(self, drawing: Drawing, tokens: Tensor) -> None:
        """Keeps the drawn tokens, int64 [N], for rows that will feed them as PENDING."""
        self.last_ids[self.upload(drawing.slots)] = tokens

    def upload(self, host: np.ndarray) -> Tensor:
        return torch.from_numpy(host).to(self.device, non_blocking=True)


def _pad(target: np.ndarray, values: np.ndarray, padding: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding


def pack_masks(drawing: Drawing, late: LateInputs, vocab_size: int) -> np.ndarray | None:
    """The masks of the drawing rows, int32 [N, words]; None when there are none."""
    if not late.masks:
        return None
    masks = np.full((len(drawing.rows), -(-vocab_size // 32)), -1, np.int32)
    for place, row in enumerate(drawing.rows.tolist()):
        if row in late.masks:
            masks[place] = late.masks[row]
    return masks
