"""Attention on the CPU by PyTorch's fused kernel in the cache's own type, where no library of ours can be compiled.

A layer's memory is bfloat16 [2, kv_heads, blocks, block_size, dim] (keys, values): what a row sees of one head is one
piece, read where it lies if the row's blocks follow each other. Long rows go alone, span by span, each over what its
queries see. Short rows of equal length go together, blocks gathered, as in the reference backend, which is the twin.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tabstop.attention import AttentionBatch, Need
from tabstop.attention.reference import Group, ReferenceAttention, alike, attend, mask_of
from tabstop.cache import CacheSpec
from tabstop.engine.plan import Copy

LONG_QUERIES = 16
"""Rows with so many queries are attended alone."""
SPAN = 64
"""Queries of a long row that are attended together: they need not look at what comes after the last of them."""
RUN_TOKENS = 8
"""Tokens of a run of slots, on average, from which runs are stored one by one."""
BATCHED_PLACES = 1024
"""Places that rows of one query see together, from which `attend_batched` wins over PyTorch's fused kernel."""


class Memory:
    """A layer's keys and values, and the views of them that a step needs."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole  # [2, kv_heads, blocks, block_size, dim]
        self.slots = whole.flatten(2, 3)
        self.blocks = whole.flatten(0, 1).flatten(2)  # [2 * kv_heads, blocks, block_size * dim]
        self.keys, self.values = self.slots[:, None].unbind()  # [1, kv_heads, slots, dim]
        self.num_kv_heads = whole.shape[1]

    def gather(self, tables: torch.Tensor, rest: torch.Tensor | None = None) -> torch.Tensor:
        """tables [R, n] → [2, R, kv_heads, n * block_size, dim]. `rest`: places that are zeroed, as in Group."""
        found = self.blocks.index_select(1, tables.flatten())
        if rest is not None and len(rest):
            found.view(len(found), -1, self.whole.shape[-1]).index_fill_(1, rest, 0)
        return found.view(2, self.num_kv_heads, len(tables), -1, self.whole.shape[-1]).transpose(1, 2)


@dataclass(slots=True)
class Span:
    """Queries of a row that is attended alone."""

    queries: slice  # in the row
    context: int  # of the last one
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window: as `attend` takes them


@dataclass(slots=True)
class Lone:
    """A row that is attended alone."""

    tokens: slice
    context: int
    first_slot: int | None  # where its blocks follow each other
    table: torch.Tensor  # int64 [1, blocks]
    spans: list[Span]


@dataclass(slots=True)
class Plan:
    """What all layers of a step share."""

    kv_slots: torch.Tensor  # int64 [T]
    runs: list[tuple[slice, slice]]  # tokens and their slots; none where hardly any follow each other
    lone: list[Lone]
    groups: list[Group]
    angles: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # the cosines given, and what `turn` takes


class SdpaAttention:
    """See the module."""

    name = "sdpa"
    sharing_width = 0

    @staticmethod
    def refuse(need: Need) -> str | None:
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if (need.dtype, need.kv_dtype) != (torch.bfloat16, torch.bfloat16):
            return f"it computes in bfloat16, not in {need.dtype} over a cache in {need.kv_dtype}"
        return None

    def __init__(self, need: Need) -> None:
        self.need = need
        self._reference = ReferenceAttention(need)

    def allocate(self, spec: CacheSpec, num_blocks: int) -> Memory:
        memory = self._reference.allocate(spec, num_blocks)
        return Memory(memory.view(2, spec.num_kv_heads, num_blocks, self.need.block_size, spec.head_dim))

    def copy(self, layers: Sequence[Memory], copies: Sequence[Copy]) -> None:
        for kv in layers:
            for source, target, num_tokens in copies:
                kv.whole[:, :, target, :num_tokens] = kv.whole[:, :, source, :num_tokens]

    def plan(self, batch: AttentionBatch) -> Plan:
        plan = Plan(batch.kv_slots, find_runs(batch.kv_slots.numpy()), [], [])
        for rows in alike(batch):
            if len(rows) == 1 or batch.query_lens[rows[0]] >= LONG_QUERIES:
                plan.lone += [self._lone(batch, row) for row in rows]
            else:
                plan.groups.append(self._reference.group(batch, rows))
        return plan

    def _lone(self, batch: AttentionBatch, row: int) -> Lone:
        num_queries, context = batch.query_lens[row], batch.context_lens[row]
        table = batch.block_tables[row, : -(-context // self.need.block_size)].long()
        blocks, start = table.numpy(), int(batch.query_starts[row])
        first_slot = int(blocks[0]) * self.need.block_size if (np.diff(blocks) == 1).all() else None
        ends = [*range(SPAN, num_queries, SPAN), num_queries]
        spans = [
            Span(slice(first, end), context - num_queries + end) for first, end in zip([0, *ends], ends, strict=False)
        ]
        return Lone(slice(start, start + num_queries), context, first_slot, table[None], spans)

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: Memory,
        meta: Plan,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Stores k and v of all rows, then attends; see the protocol for shapes."""
        store(torch.stack((k, v), dim=1), kv, meta)
        return self.attend(q, kv, meta, scale, window)

    def rotate_and_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: Memory, meta: Plan
    ) -> torch.Tensor:
        """As the protocol says, in place: the result is a view of qkv."""
        if meta.angles is None or meta.angles[0] is not cos:
            cosines, sines = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            meta.angles = (cos, cosines.to(qkv.dtype), sines.to(qkv.dtype))
        heads = qkv.view(len(qkv), -1, self.need.head_dim)
        first_key = heads.shape[1] - 2 * kv.num_kv_heads
        turn(heads[:, : first_key + kv.num_kv_heads], *meta.angles[1:])
        store(heads[:, first_key:].view(len(qkv), 2, kv.num_kv_heads, -1), kv, meta)
        return heads[:, :first_key]

    def attend(self, q: torch.Tensor, kv: Memory, meta: Plan, scale: float, window: int | None) -> torch.Tensor:
        how = (scale, window)
        if len(meta.lone) == 1 and not meta.groups:
            return self._attend_alone(q, kv, meta.lone[0], how)
        if len(meta.groups) == 1 and not meta.lone:
            return self._attend_group(q, kv, meta.groups[0], how)
        result = torch.empty(q.shape, dtype=q.dtype)
        for row in meta.lone:
            result[row.tokens] = self._attend_alone(q[row.tokens], kv, row, how)
        for group in meta.groups:
            result[group.tokens] = self._attend_group(q[group.tokens], kv, group, how)
        return result

    def _attend_group(self, q: torch.Tensor, kv: Memory, group: Group, how: tuple[float, int | None]) -> torch.Tensor:
        """q [R * Q, heads, dim] → the same. how: scale and window."""
        scale, window = how
        keys, values = kv.gather(group.tables, group.rest)
        mask = self._reference.mask(group, window, keys.dtype)
        num_places = group.tables.numel() * self.need.block_size
        is_batched = group.num_queries == 1 and num_places >= BATCHED_PLACES and has_batched_products()
        return (attend_batched if is_batched else attend)(q, keys, values, mask, scale)

    def _attend_alone(self, q: torch.Tensor, kv: Memory, row: Lone, how: tuple[float, int | None]) -> torch.Tensor:
        """As `_attend_group` for one row."""
        scale, window = how
        if row.first_slot is None:
            keys, values, start = *kv.gather(row.table), 0
        else:
            keys, values, start = kv.keys, kv.values, row.first_slot
        parts = []
        for span in row.spans:
            first, mask = self._seen(span, window)
            k, v = (each.narrow(2, start + first, span.context - first) for each in (keys, values))
            parts.append(attend(q[span.queries], k, v, mask, scale))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _seen(self, span: Span, window: int | None) -> tuple[int, torch.Tensor | None]:
        """The first position that any of the queries sees, and the mask from there on; made by the first layer."""
        num_queries = span.queries.stop - span.queries.start
        first = 0 if window is None else max(0, span.context - num_queries + 1 - window)
        if num_queries == 1:  # sees all from there on
            return first, None
        if window not in span.masks:
            queries, places = torch.arange(span.context - num_queries, span.context), torch.arange(first, span.context)
            mask = mask_of(queries[:, None], places, window, self._reference.num_sharing)
            span.masks[window] = mask.to(self.need.dtype)
        return first, span.masks[window]


@functools.cache
def has_batched_products() -> bool:
    """Whether PyTorch multiplies batches in bfloat16 by a library here; its own loops take ten times as long."""
    has_library = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(has_library and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attend_batched(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """As `attend`, its twin, for several rows of one query each: two batched products of all heads of all rows.

    PyTorch's fused kernel starts two products of a few queries for each head of each row, which costs twice as much.
    Scores are rounded to bfloat16 here, once, with their scale and mask (docs/log.md has what that changes).
    """
    num_rows, kv_heads, length = keys.shape[:3]
    num_pairs = kv_heads * num_rows
    by_head = q.view(num_rows, kv_heads, -1, q.shape[-1]).transpose(0, 1).reshape(num_pairs, -1, q.shape[-1])
    # As they were gathered: rows of one head follow each other.
    keys, values = (each.transpose(0, 1).view(num_pairs, length, -1) for each in (keys, values))
    everywhere = mask.view(1, num_rows, 1, length).expand(kv_heads, -1, -1, -1).reshape(num_pairs, 1, length)
    scores = torch.baddbmm(everywhere, by_head, keys.transpose(1, 2), alpha=scale)
    attended = torch.bmm(torch.softmax(scores, -1), values)
    return attended.view(kv_heads, num_rows, -1, q.shape[-1]).transpose(0, 1).reshape(q.shape)


def find_runs(slots: np.ndarray) -> list[tuple[slice, slice]]:
    """Slots of a step's tokens [T] → its runs (tokens, slots); none where they are too short to pay."""
    starts = np.flatnonzero(np.diff(slots, prepend=slots[:1] - 2) != 1)
    if len(starts) > 1 and len(starts) * RUN_TOKENS > len(slots):
        return []
    ends = [*starts[1:].tolist(), len(slots)]
    return [
        (slice(start, end), slice(slot, slot + end - start))
        for start, end, slot in zip(starts.tolist(), ends, slots[starts].tolist(), strict=True)
    ]


def store(new: torch.Tensor, kv: Memory, plan: Plan) -> None:
    """new [T, 2, kv_heads, dim] → their slots in a layer's memory."""
    new = new.permute(1, 2, 0, 3)
    if not plan.runs:
        kv.slots.index_copy_(2, plan.kv_slots, new)
    for tokens, slots in plan.runs:
        kv.slots[:, :, slots] = new[:, :, tokens]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """In place the pairs (i, i + dim / 2) of x [T, heads, dim]. cos, sin: [T, 1, dim], half of sin negated."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    torch.addcmul(x * cos, swapped, sin, out=x)
