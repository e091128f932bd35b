"""Attention by the CPU's own kernels: block tables are walked in place, nothing is gathered.

KV memory of a layer is bfloat16 [blocks, values of a block]: for each KV head and 16 positions, keys in pairs along the
head and values in pairs of positions (kernels/cpu/attention.h). The twin is attention/reference.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tabstop.attention import AttentionBatch, Need
from tabstop.cache import CacheKind, CacheSpec
from tabstop.engine.plan import Copy
from tabstop.kernels.cpu.library import KVShape, Step, Threads, refuse
from tabstop.kernels.cpu.memory import large_zeros
from tabstop.kernels.cpu.program import Kind, Program, operation

LANES = 16
MAX_HEAD_DIM = 512


@dataclass(slots=True)
class Plan:
    """What all layers of a step share."""

    batch: AttentionBatch
    step: Step


class CpuAttention:
    """See the module."""

    name = "cpu"
    sharing_width = 0

    @staticmethod
    def refuse(need: Need) -> str | None:
        if need.device.type != "cpu":
            return f"it runs on the CPU, not on {need.device.type}"
        if need.dtype != torch.float32 or need.kv_dtype != torch.bfloat16:
            return f"it computes in float32 over a bfloat16 cache, not in {need.dtype} over {need.kv_dtype}"
        if need.block_size % LANES:
            return f"blocks must be a multiple of {LANES} tokens, not {need.block_size}"
        if need.head_dim % 2 or need.head_dim > MAX_HEAD_DIM:
            return f"heads must have an even number of values up to {MAX_HEAD_DIM}, not {need.head_dim}"
        return refuse()

    def __init__(self, need: Need) -> None:
        self.need = need
        self.shape = KVShape(need.num_heads, need.num_kv_heads, need.head_dim, need.block_size)
        self._programs: dict[tuple[float, int], Program] = {}

    def allocate(self, spec: CacheSpec, num_blocks: int) -> torch.Tensor:
        """Pages that the system zeroes when they are first used."""
        assert spec.kind is CacheKind.PAGED
        padded_dim = -(-spec.head_dim // LANES) * LANES
        block_values = spec.num_kv_heads * self.need.block_size * (spec.head_dim + padded_dim)
        memory = large_zeros(num_blocks * block_values * torch.bfloat16.itemsize)
        return memory.view(torch.bfloat16).view(num_blocks, block_values)

    def copy(self, layers: Sequence[torch.Tensor], copies: Sequence[Copy]) -> None:
        """Whole blocks: what lies behind the first `num_tokens` is written by the new owner before it is read."""
        for kv in layers:
            for source, target, _ in copies:
                kv[target] = kv[source]

    def plan(self, batch: AttentionBatch) -> Plan:
        return Plan(batch, fill_step(batch))

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
        num_tokens = len(q)
        qkv = torch.cat([each.reshape(num_tokens, -1) for each in (q, k, v)], dim=1).float()
        memory = (ctypes.c_void_p * 1)(kv.data_ptr())
        meta.step.kv, meta.step.x = ctypes.addressof(memory), qkv.data_ptr()
        self._program(scale, window or 0).run(meta.step)
        return qkv[:, : q.shape[1] * q.shape[2]].reshape(q.shape).to(q.dtype)

    def _program(self, scale: float, window: int) -> Program:
        """Attention alone, one program for each kind of layer; the result takes the place of q."""
        if (scale, window) not in self._programs:
            width = (self.need.num_heads + 2 * self.need.num_kv_heads) * self.need.head_dim
            operations = [operation(Kind.STORE), operation(Kind.ATTEND, factor=scale, window=window)]
            self._programs[scale, window] = Program(operations, self.shape, [width], [])
        return self._programs[scale, window]


def fill_step(batch: AttentionBatch) -> Step:
    """The batch as the library takes it. It lives as long as the batch's tensors do."""
    return Step(
        num_tokens=len(batch.kv_slots),
        num_rows=len(batch.query_lens),
        table_stride=batch.block_tables.stride(0),
        kv_slots=batch.kv_slots.data_ptr(),
        query_starts=batch.query_starts.data_ptr(),
        contexts=batch.contexts.data_ptr(),
        tables=batch.block_tables.data_ptr(),
        num_threads=Threads.count,
    )
