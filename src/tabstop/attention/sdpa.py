"""Attention on the CPU by PyTorch's fused kernel in the cache's own type, where no library of ours can be compiled.

Memory, plans and groups of rows are the reference backend's (attention/reference.py), which is also the twin. Blocks
are gathered, but neither widened to float32 nor copied again; one row that decodes needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from tabstop.attention import AttentionBatch, Need
from tabstop.attention.reference import Group, Plan, ReferenceAttention
from tabstop.cache import CacheSpec
from tabstop.engine.plan import Copy


class SdpaAttention:
    """See the module."""

    name = "sdpa"

    @staticmethod
    def refuse(need: Need) -> str | None:
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if need.kv_dtype != torch.bfloat16:
            return f"it computes in bfloat16, not over a cache in {need.kv_dtype}"
        return None

    def __init__(self, need: Need) -> None:
        self.need = need
        self._reference = ReferenceAttention(need)

    def allocate(self, spec: CacheSpec, num_blocks: int) -> torch.Tensor:
        return self._reference.allocate(spec, num_blocks)

    def copy(self, layers: Sequence[torch.Tensor], copies: Sequence[Copy]) -> None:
        self._reference.copy(layers, copies)

    def plan(self, batch: AttentionBatch) -> Plan:
        return self._reference.plan(batch)

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
        keys, values = kv[0], kv[1]
        keys.flatten(0, 1).index_copy_(0, meta.kv_slots, k.to(kv.dtype))
        values.flatten(0, 1).index_copy_(0, meta.kv_slots, v.to(kv.dtype))
        narrow, result = q.to(kv.dtype), torch.empty_like(q)
        for group in meta.groups:
            is_whole = len(group.tokens) == len(q)
            attended = self._attend(narrow if is_whole else narrow[group.tokens], keys, values, group, (scale, window))
            if is_whole:
                return attended.to(q.dtype)
            result[group.tokens] = attended.to(q.dtype)
        return result

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: Group, how: tuple[float, int | None]
    ) -> torch.Tensor:
        """q [R * Q, heads, dim] → the same, in the cache's type. how: scale and window."""
        scale, window = how
        num_rows, kv_heads = len(group.tables), keys.shape[2]
        shared = q.shape[1] // kv_heads
        gathered = [memory.flatten(1).index_select(0, group.tables.flatten()) for memory in (keys, values)]
        k, v = (each.view(num_rows, -1, *keys.shape[2:]).transpose(1, 2) for each in gathered)
        mask = None
        if num_rows == 1 and group.num_queries == 1:
            last = int(group.positions) + 1  # what a lone query sees is one run of positions
            first = 0 if window is None else max(0, last - window)
            k, v = k[:, :, first:last], v[:, :, first:last]
        else:
            mask = self._reference.mask(group, window).to(q.dtype)
            mask = mask.repeat(1, 1, shared, 1) if group.num_queries > 1 else mask
        folded = q.view(num_rows, group.num_queries, kv_heads, shared, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
        attended = functional.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
        return attended.view(num_rows, kv_heads, shared, group.num_queries, -1).permute(0, 3, 1, 2, 4).reshape(q.shape)
