"""Attention by our own Triton kernels, for NVIDIA GPUs: split-KV decoding, tiled prompts, one layout for both.

KV memory of a layer is one tensor [blocks, 2, KV heads, block_size, dim]. A plan holds device memory and counts only:
a step that is captured in a CUDA graph may be replayed with other rows, as long as `plan` was given, at capture, at
least as many rows, tokens and rows with many new tokens, and contexts at least as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from tabstop.attention import AttentionBatch, Need
from tabstop.cache import CacheKind, CacheSpec
from tabstop.engine.plan import Copy
from tabstop.kernels import copy_blocks, language, rope_store
from tabstop.kernels.attention import Rows, View
from tabstop.kernels.decode import DecodePlan, decode_triton, longest_rows, plan_decode
from tabstop.kernels.prefix import plan_prefix, width_of
from tabstop.kernels.prompt import PromptPlan, plan_prompt, prompt_triton

HEAD_DIMS = range(16, 257, 8)


@dataclass(frozen=True, slots=True)
class Plan:
    """What all layers of a step share."""

    kv_slots: torch.Tensor  # int64 [T], below 0 where nothing is stored
    rows: Rows
    decode: DecodePlan | None
    prompt: PromptPlan | None


class TritonAttention:
    """See the module."""

    name = "triton"

    @staticmethod
    def refuse(need: Need) -> str | None:
        if need.device.type != "cuda":
            return f"it runs on NVIDIA GPUs, not on '{need.device.type}'"
        if need.head_dim not in HEAD_DIMS:
            return f"heads of {need.head_dim} values; it takes multiples of 8 from 16 to 256"
        return language.why_unavailable([need.dtype, need.kv_dtype])

    def __init__(self, need: Need) -> None:
        self.need = need
        self.heads = (need.num_heads, need.num_kv_heads, need.head_dim)
        self.sharing_width = 0 if need.window else width_of(need.num_heads // need.num_kv_heads, need.kv_dtype)

    def allocate(self, spec: CacheSpec, num_blocks: int) -> torch.Tensor:
        assert spec.kind is CacheKind.PAGED
        shape = (num_blocks, 2, spec.num_kv_heads, self.need.block_size, spec.head_dim)
        return torch.zeros(shape, dtype=self.need.kv_dtype, device=self.need.device)

    def copy(self, layers: Sequence[torch.Tensor], copies: Sequence[Copy]) -> None:
        copy_blocks.copy_blocks(layers, copies)

    def plan(self, batch: AttentionBatch) -> Plan:
        """Launches at most one small kernel, never waits; reads of the lists only what bounds the grids."""
        rows = Rows(batch.query_starts, batch.contexts, batch.block_tables)
        longest = self._longest_decoding_row(batch.query_lens)
        num_long = sum(length > longest for length in batch.query_lens)
        num_long = min(num_long, len(batch.kv_slots) // (longest + 1))  # lists may bound what a graph will serve
        like = batch.contexts.new_empty(0, dtype=self.need.kv_dtype)
        decoding = prompts = None
        if num_long < len(batch.query_lens):
            prefix = plan_prefix(batch.sharing, self.heads, like) if batch.sharing is not None else None
            decoding = plan_decode(len(batch.contexts), self.heads, longest, max(batch.context_lens), like, prefix)
        if num_long:
            prompts = plan_prompt(rows, longest + 1, (num_long, len(batch.kv_slots)), self.heads, like)
        return Plan(batch.kv_slots, rows, decoding, prompts)

    def _longest_decoding_row(self, query_lens: Sequence[int]) -> int:
        """Rows up to this many queries are packed in the decoding kernel: few, unless many rows have drafts."""
        narrow, wide = longest_rows(self.need.num_heads // self.need.num_kv_heads)
        num_wide = sum(narrow < length <= wide for length in query_lens)
        return wide if 4 * num_wide > len(query_lens) else narrow

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
        rope_store.store(k, v, kv, meta.kv_slots)
        return self.attend(q.contiguous(), kv, meta, scale, window)

    def rotate_and_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, meta: Plan
    ) -> torch.Tensor:
        """qkv [T, (heads + 2 · KV heads) · dim] → turned q [T, heads, dim]; turned k, and v, are stored."""
        return rope_store.rotate_and_store(qkv, cos, sin, kv, meta.kv_slots)

    def attend(self, q: torch.Tensor, kv: torch.Tensor, meta: Plan, scale: float, window: int | None) -> torch.Tensor:
        """q [T, heads, dim] over what is stored → [T, heads, dim]; the places of padding are left as they were."""
        result = torch.empty_like(q)
        view = View(scale, window)
        if meta.prompt is not None and meta.decode is not None and q.is_cuda:
            # Beside each other: prompts are bound by arithmetic, decoding by memory.
            here = torch.cuda.current_stream()
            self._beside.wait_stream(here)
            with torch.cuda.stream(self._beside):
                prompt_triton(q, kv, result, meta.rows, meta.prompt, view)
            decode_triton(q, kv, result, meta.rows, meta.decode, view)
            here.wait_stream(self._beside)
            return result
        if meta.prompt is not None:
            prompt_triton(q, kv, result, meta.rows, meta.prompt, view)
        if meta.decode is not None:
            decode_triton(q, kv, result, meta.rows, meta.decode, view)
        return result

    @cached_property
    def _beside(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.need.device)  # type: ignore[no-untyped-call]
