"""Attention in plain torch, on any device: the oracle of all other backends, and the one that never declines.

KV memory of a layer is one tensor [2, blocks, block_size, kv_heads, dim] (keys, values). Rows are attended in groups of
equal query length and similar context: their blocks are gathered into one batch, and the mathematics is float32
whatever the compute type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from tabstop.attention import AttentionBatch, Need
from tabstop.cache import CacheKind, CacheSpec
from tabstop.engine.plan import Copy


@dataclass(slots=True)
class Group:
    """Rows attended together: Q queries each, contexts padded to L, a whole number of blocks."""

    tokens: torch.Tensor  # int64 [R * Q] their places in the step's tokens
    tables: torch.Tensor  # int64 [R, L / block_size] past a row's context: its own first block
    positions: torch.Tensor  # int64 [R, Q] of the queries
    num_queries: int
    longest: int  # context of the rows
    rest: torch.Tensor  # int64 places in [R * L] of last blocks that are past their row's context
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window: additive, as `attend` takes them


@dataclass(slots=True)
class Plan:
    """What all layers of a step share."""

    kv_slots: torch.Tensor  # int64 [T]
    groups: list[Group]


class ReferenceAttention:
    """See the module."""

    name = "reference"
    sharing_width = 0

    @staticmethod
    def refuse(need: Need) -> str | None:
        return None

    def __init__(self, need: Need) -> None:
        self.need = need
        self.num_sharing = need.num_heads // need.num_kv_heads  # heads that share keys

    def allocate(self, spec: CacheSpec, num_blocks: int) -> torch.Tensor:
        """Zeros: a masked position counts 0 times its value, which must not be a NaN."""
        assert spec.kind is CacheKind.PAGED
        shape = (2, num_blocks, self.need.block_size, spec.num_kv_heads, spec.head_dim)
        if self.need.device.type != "cpu":
            return torch.zeros(shape, dtype=self.need.kv_dtype, device=self.need.device)
        # The system's untouched pages are zero already and cost nothing until used; torch.zeros would write them all.
        untouched = np.zeros(math.prod(shape) * self.need.kv_dtype.itemsize, np.uint8)
        return torch.from_numpy(untouched).view(self.need.kv_dtype).view(shape)

    def copy(self, layers: Sequence[torch.Tensor], copies: Sequence[Copy]) -> None:
        for kv in layers:
            for source, target, num_tokens in copies:
                kv[:, target, :num_tokens] = kv[:, source, :num_tokens]

    def plan(self, batch: AttentionBatch) -> Plan:
        return Plan(batch.kv_slots, [self.group(batch, rows) for rows in alike(batch)])

    def group(self, batch: AttentionBatch, rows: list[int]) -> Group:
        """Rows that are alike, together."""
        device, block_size, num_queries = batch.kv_slots.device, self.need.block_size, batch.query_lens[rows[0]]
        longest = max(batch.context_lens[row] for row in rows)
        num_blocks = -(-longest // block_size)
        index = torch.tensor(rows, device=device)
        contexts = batch.contexts[index].long()[:, None]
        tables = batch.block_tables[index, :num_blocks].long()
        used = torch.arange(num_blocks, device=device) * block_size < contexts
        places = torch.arange(num_blocks * block_size, device=device)
        rest = (places >= contexts) & (places < (contexts + block_size - 1) // block_size * block_size)
        queries = torch.arange(num_queries, device=device)
        tokens = batch.query_starts[index].long()[:, None] + queries
        return Group(
            tokens=tokens.flatten(),
            tables=torch.where(used, tables, tables[:, :1]),
            positions=contexts - num_queries + queries,
            num_queries=num_queries,
            longest=longest,
            rest=rest.flatten().nonzero()[:, 0],
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv: torch.Tensor,
        meta: Plan,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Stores k and v of all rows, then attends; see the protocol for shapes."""
        store(k, v, kv, meta.kv_slots)
        result = torch.empty_like(q)
        for group in meta.groups:
            queries = q if len(group.tokens) == len(q) else q[group.tokens]
            keys, values = gather_blocks(kv, group).float()
            attended = attend(queries, keys, values, self.mask(group, window), scale)
            if len(meta.groups) == 1:
                return attended.to(q.dtype)
            result[group.tokens] = attended.to(q.dtype)
        return result

    def mask(self, group: Group, window: int | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """0 where a query sees a position, else -inf; made by the first layer with this window, in the type it asks."""
        if window not in group.masks:
            length = group.tables.shape[1] * self.need.block_size
            places = torch.arange(length, device=group.tables.device)
            mask = mask_of(group.positions[:, None, :, None], places, window, self.num_sharing)
            group.masks[window] = mask.to(dtype)
        return group.masks[window]


def alike(batch: AttentionBatch) -> list[list[int]]:
    """Rows with equal numbers of queries and similar contexts."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for row, (queries, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        by_shape.setdefault((queries, context.bit_length()), []).append(row)
    return list(by_shape.values())


def mask_of(queries: torch.Tensor, places: torch.Tensor, window: int | None, num_sharing: int) -> torch.Tensor:
    """queries [..., Q, 1] and places [L], both positions → 0 where a query sees a place, else -inf: float32
    [..., num_sharing * Q, L], the queries once for each head that shares keys; for lone queries [..., 1, L]."""
    seen = places <= queries
    if window is not None:
        seen &= places > queries - window
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
    return torch.cat([mask] * num_sharing, dim=-2) if mask.shape[-2] > 1 else mask


def store(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, kv_slots: torch.Tensor) -> None:
    """k, v [T, kv_heads, dim] → their slots in a layer's memory."""
    kv.flatten(1, 2).index_copy_(1, kv_slots, torch.stack((k, v)).to(kv.dtype))


def gather_blocks(kv: torch.Tensor, group: Group) -> torch.Tensor:
    """kv [2, blocks, block_size, kv_heads, dim] → the rows' keys and values [2, R, kv_heads, L, dim], of its type.

    What somebody else left in a last block is zeroed: it may be a NaN, and a masked position counts 0 times that.
    """
    tables = group.tables
    rows = kv.flatten(2).index_select(1, tables.flatten())  # whole blocks at a time: indexing is 15 times slower
    rows = rows.view(2, -1, *kv.shape[3:])
    if len(group.rest):
        rows.index_fill_(1, group.rest, 0)
    return rows.view(2, len(tables), -1, *kv.shape[3:]).transpose(2, 3)


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(q k^T · scale + mask) v in the type of the keys.

    q [R * Q, heads, dim] · keys, values [R, kv_heads, L, dim] · mask of their type: [R, 1, group * Q, L], for lone
    queries [R, 1, 1, L], or None where all is seen → [R * Q, heads, dim]. The heads that share a key head are folded
    into the query axis: broadcasting keys over them is several times slower.
    """
    num_rows, kv_heads = keys.shape[:2]
    num_queries, group = len(q) // num_rows, q.shape[1] // kv_heads
    if num_queries == 1:
        folded = q.view(num_rows, kv_heads, group, -1).to(keys.dtype)
        attended = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
        return attended.reshape(q.shape)
    folded = q.view(num_rows, num_queries, kv_heads, group, -1).permute(0, 2, 3, 1, 4).flatten(2, 3).to(keys.dtype)
    attended = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    unfolded = attended.view(num_rows, kv_heads, group, num_queries, -1).permute(0, 3, 1, 2, 4)
    return unfolded.reshape(q.shape)
