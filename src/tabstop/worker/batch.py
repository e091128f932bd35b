"""StepPlan → tensors. Knows slots, tables and positions; no model and no scheduling.

All integers of a step lie in one host buffer, so a device needs one copy. A batch may be padded to a bucket's shape, so
that a captured graph can serve it: surplus tokens write their keys and values to a scratch block that no table holds,
surplus rows have no tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from tabstop.attention import AttentionBatch
from tabstop.engine.plan import PENDING, LateInputs, StepPlan
from tabstop.kernels import feed
from tabstop.kernels.attention import Sharing
from tabstop.worker import sharing

HostViews = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a batch: exact, or those of the bucket that it is padded to."""

    num_tokens: int
    num_rows: int
    num_blocks: int  # columns of the block tables
    sharing_width: int = 0  # as in AttentionBackend


@dataclass(slots=True)
class StepInputs:
    """One step's device tensors: T tokens in R rows. Rows that draw nothing have a last token all the same."""

    ids: Tensor  # int64 [T]; -1 - slot where the host does not know a row's last token, but the slot does
    has_unknown: bool  # whether there may be such ids
    positions: Tensor  # int64 [T]
    last_tokens: Tensor  # int64 [R] index of each row's last token in T
    slots: Tensor  # int64 [R] of rows that draw; of others, and of padding, one that no sequence has
    temperature: Tensor  # float32 [R], filled on request; 0: the likeliest token
    uniform: Tensor  # float32 [R], filled on request: the draws' random numbers
    attention: AttentionBatch


@dataclass(slots=True)
class Drawing:
    """Which rows of a plan draw a token, on the host; N of them."""

    rows: np.ndarray  # int64 [N] their index in the plan
    slots: np.ndarray  # int64 [N]
    positions: np.ndarray  # int64 [N] of the token to draw


@dataclass(slots=True)
class PromptTokens:
    """Which tokens of a plan's prompts are to be reported, on the host; M of them."""

    rows: np.ndarray  # int64 [M] their row in the plan
    places: np.ndarray  # int64 [M] index in T of the token before each, whose hidden state foretells it
    ids: np.ndarray  # int64 [M]
    wanted: np.ndarray  # int64 [M] how many likeliest tokens beside each


def prompt_tokens(plan: StepPlan) -> PromptTokens | None:
    """None where nobody asks."""
    parts, end = [], 0
    for index, row in enumerate(plan.rows):
        if row.report is not None:
            ids = np.array(row.report.next_ids, np.int64)
            first = end + row.report.first
            whose = (np.full(len(ids), number) for number in (index, row.report.num_top))
            parts.append((next(whose), np.arange(first, first + len(ids)), ids, next(whose)))
        end += len(row.token_ids)
    return PromptTokens(*map(np.concatenate, zip(*parts, strict=True))) if parts else None


Numbers = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(slots, positions) of drawing rows → their (temperature, uniform), float32 each."""

ALIGNMENT = 16
"""Bytes. Kernels are compiled anew for pointers that are less aligned than those before."""


class Buffer:
    """Host and device memory of one batch shape, and typed views of both."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        tokens, rows = shape.num_tokens, shape.num_rows
        counts = {
            torch.int64: {"ids": tokens, "positions": tokens, "kv_slots": tokens, "last_tokens": rows, "slots": rows},
            torch.int32: {"query_starts": rows + 1, "contexts": rows, "tables": rows * shape.num_blocks},
            torch.float32: {"temperature": rows, "uniform": rows},
        }
        if shape.sharing_width:
            tiles = sharing.max_tiles(rows, shape.sharing_width) * shape.sharing_width
            counts[torch.int32] |= {"sharing_lens": rows, "sharing_tiles": tiles}
        self._places, num_bytes = _places(counts)
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._device = self._host if device.type == "cpu" else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.host = {name: view.numpy() for name, view in self._views(self._host).items()}
        self.device = self._views(self._device)
        self._uploaded = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {name: memory[place].view(dtype) for name, (place, dtype) in self._places.items()}
        views["tables"] = views["tables"].view(self.shape.num_rows, self.shape.num_blocks)
        if "sharing_tiles" in views:
            views["sharing_tiles"] = views["sharing_tiles"].view(-1, self.shape.sharing_width)
        return views

    def wait(self) -> None:
        """Until the host memory may be written again."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def upload(self) -> None:
        if self._uploaded is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._uploaded.record()


def _places(counts: dict[torch.dtype, dict[str, int]]) -> tuple[dict[str, tuple[slice, torch.dtype]], int]:
    """Where each named run of values lies, aligned, and the bytes of all."""
    places, end = {}, 0
    for dtype, named in counts.items():
        for name, count in named.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + count * dtype.itemsize
            places[name] = (slice(start, end), dtype)
    return places, end


class SlotState:
    """What is remembered of each running sequence between steps."""

    def __init__(
        self, tables: np.ndarray, block_size: int, scratch_block: int, device: torch.device, sharing_width: int = 0
    ) -> None:
        """tables: int32 [sequences, blocks of the longest], all zero."""
        self.block_size = block_size
        self.scratch_block = scratch_block  # belongs to nobody
        self.device = device
        self.sharing_width = sharing_width
        self.tables = tables
        self.no_slot = len(tables)  # that of padding
        self.last_ids = torch.zeros(len(tables) + 1, dtype=torch.int64, device=device)  # last token drawn in each slot

    def exact_shape(self, plan: StepPlan) -> Shape:
        """No padding."""
        longest = max(row.start + len(row.token_ids) for row in plan.rows)
        return Shape(plan.num_tokens, len(plan.rows), -(-longest // self.block_size), self.sharing_width)

    def apply_tables(self, plan: StepPlan) -> None:
        for slot, first, blocks in plan.tables:
            self.tables[slot, first : first + len(blocks)] = blocks

    def fill(self, plan: StepPlan, buffer: Buffer, numbers: Numbers | None = None) -> tuple[StepInputs, Drawing]:
        """Lays the plan's rows out one after the other in the buffer, and uploads it.

        `numbers`: what every row draws by, where that shall be on the device.
        """
        buffer.wait()
        host = buffer.host
        slots = np.array([row.slot for row in plan.rows])
        starts = np.array([row.start for row in plan.rows])
        lens = np.array([len(row.token_ids) for row in plan.rows])
        contexts, ends = starts + lens, np.cumsum(lens)
        self._fill_tokens(host, slots, contexts - ends, lens)
        ids = np.fromiter(chain.from_iterable(row.token_ids for row in plan.rows), np.int64, int(ends[-1]))
        unknown = np.flatnonzero(ids[ends - 1] == PENDING)
        ids[ends[unknown] - 1] = -1 - slots[unknown]
        _pad(host["ids"], ids, 0)
        draws = np.array([row.sample for row in plan.rows])
        self._fill_rows(host, slots, contexts, ends)
        if "sharing_lens" in host:
            tables = host["tables"][: len(slots)]
            stored = np.where(lens == 1, starts, 0)
            sharing.find_sharing(tables, stored, self.block_size, host["sharing_lens"], host["sharing_tiles"])
        _pad(host["slots"], np.where(draws, slots, self.no_slot), self.no_slot)
        if numbers is not None:
            host["temperature"][: len(slots)], host["uniform"][: len(slots)] = numbers(slots, contexts)
        buffer.upload()
        rows = np.flatnonzero(draws)
        inputs = _inputs(buffer.device, lens.tolist(), contexts.tolist(), has_unknown=bool(unknown.size))
        return inputs, Drawing(rows, slots[rows], contexts[rows])

    def _fill_rows(
        self, host: dict[str, np.ndarray], slots: np.ndarray, contexts: np.ndarray, ends: np.ndarray
    ) -> None:
        """What is said of each row; `ends`: of their tokens."""
        _pad(host["last_tokens"], ends - 1, 0)
        host["query_starts"][0] = 0
        _pad(host["query_starts"][1:], ends, int(ends[-1]))
        _pad(host["contexts"], contexts, 0)
        host["tables"][: len(slots)] = self.tables[slots, : host["tables"].shape[1]]

    def _fill_tokens(
        self, host: dict[str, np.ndarray], slots: np.ndarray, shifts: np.ndarray, lens: np.ndarray
    ) -> None:
        """Each token's position (its index plus its row's shift) and the KV slot that its row's table gives it."""
        positions = np.arange(lens.sum()) + np.repeat(shifts, lens)
        blocks = self.tables[np.repeat(slots, lens), positions // self.block_size].astype(np.int64)
        _pad(host["positions"], positions, 0)
        kv_slots = blocks * self.block_size + positions % self.block_size
        _pad(host["kv_slots"], kv_slots, self.scratch_block * self.block_size)

    def known_ids(self, inputs: StepInputs) -> Tensor:
        """int64 [T]: the inputs' ids, those that only slots know looked up there."""
        return feed.known_ids(inputs.ids, self.last_ids) if inputs.has_unknown else inputs.ids

    def remember(self, drawing: Drawing, tokens: Tensor) -> None:
        """Keeps the drawn tokens, int64 [N], for rows that will feed them as PENDING."""
        self.last_ids[self.upload(drawing.slots)] = tokens

    def upload(self, host: np.ndarray) -> Tensor:
        return torch.from_numpy(host).to(self.device, non_blocking=True)


def _inputs(
    device: dict[str, Tensor], query_lens: list[int], context_lens: list[int], *, has_unknown: bool
) -> StepInputs:
    """A filled buffer's views, by what they are for."""
    return StepInputs(
        ids=device["ids"],
        has_unknown=has_unknown,
        positions=device["positions"],
        last_tokens=device["last_tokens"],
        slots=device["slots"],
        temperature=device["temperature"],
        uniform=device["uniform"],
        attention=AttentionBatch(
            query_lens=query_lens,
            context_lens=context_lens,
            query_starts=device["query_starts"],
            contexts=device["contexts"],
            block_tables=device["tables"],
            kv_slots=device["kv_slots"],
            sharing=Sharing(device["sharing_lens"], device["sharing_tiles"]) if "sharing_lens" in device else None,
        ),
    )


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
