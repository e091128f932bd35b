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
        if (need.dtype, need.kv_dtype) != (torch.bfloat16, torch.bfloat16):
            return f"it computes in bfloat16, not in {need.dtype} over a cache in {need.kv_dtype}"
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
        if len(meta.groups) == 1:
            return self._attend(q, kv, meta.groups[0], (scale, window))
        result = torch.empty_like(q)
        for group in meta.groups:
            result[group.tokens] = self._attend(q[group.tokens], kv, group, (scale, window))
        return result

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, group: Group, how: tuple[float, int | None]) -> torch.Tensor:
        """q [R * Q, heads, dim] → the same. how: scale and window."""
        scale, window = how
        keys, values = gather_blocks(kv, group)
        if len(group.tables) > 1 or group.num_queries > 1:
            return attend(q, keys, values, self._reference.mask(group, window), scale)
        first = 0 if window is None else max(0, group.longest - window)
        seen = slice(first, group.longest)  # what a lone query sees is one run of positions
        return attend(q, keys[:, :, seen], values[:, :, seen], None, scale)
