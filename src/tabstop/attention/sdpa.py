"""Attention on the CPU by PyTorch's fused kernel in the cache's own type, where no library of ours can be compiled.

Memory, plans and groups of rows are the reference backend's (attention/reference.py), which is also the twin. Blocks
are gathered, but neither widened to float32 nor copied again; one row that decodes needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tabstop.attention import AttentionBatch, Need
from tabstop.attention.reference import Group, Plan, ReferenceAttention, attend, gather_blocks, store
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
        store(k, v, kv, meta.kv_slots)
        narrow, result = q.to(kv.dtype), torch.empty_like(q)
        for group in meta.groups:
            is_whole = len(group.tokens) == len(q)
            attended = self._attend(narrow if is_whole else narrow[group.tokens], kv, group, (scale, window))
            if is_whole:
                return attended.to(q.dtype)
            result[group.tokens] = attended.to(q.dtype)
        return result

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, group: Group, how: tuple[float, int | None]) -> torch.Tensor:
        """q [R * Q, heads, dim] → the same, in the cache's type. how: scale and window."""
        scale, window = how
        keys, values = (gather_blocks(memory, group.tables) for memory in kv)
        if len(group.tables) > 1 or group.num_queries > 1:
            return attend(q, keys, values, self._reference.mask(group, window), scale)
        last = int(group.positions) + 1  # what a lone query sees is one run of positions
        first = 0 if window is None else max(0, last - window)
        return attend(q, keys[:, :, first:last], values[:, :, first:last], None, scale)
