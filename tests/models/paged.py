"""Drives a model over paged KV memory by hand: rows of any lengths, blocks in random order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from tabstop.attention import AttentionBackend, AttentionBatch, Need, make_backend
from tabstop.models import Model, StepContext

BLOCK_SIZE = 4


def make_batch(
    tables: Sequence[Sequence[int]], starts: Sequence[int], lens: Sequence[int], block_size: int, device: Any = "cpu"
) -> AttentionBatch:
    """The attention's view of rows with `lens` new tokens at positions from `starts` on."""
    ends = [start + length for start, length in zip(starts, lens, strict=True)]
    width = max(len(table) for table in tables)
    padded = [[*table, *[-1] * (width - len(table))] for table in tables]  # entries past the context are arbitrary
    slots = [
        table[position // block_size] * block_size + position % block_size
        for table, start, end in zip(tables, starts, ends, strict=True)
        for position in range(start, end)
    ]
    return AttentionBatch(
        query_lens=list(lens),
        context_lens=ends,
        query_starts=torch.tensor([sum(lens[:row]) for row in range(len(lens) + 1)], dtype=torch.int32, device=device),
        contexts=torch.tensor(ends, dtype=torch.int32, device=device),
        block_tables=torch.tensor(padded, dtype=torch.int32, device=device),
        kv_slots=torch.tensor(slots, device=device),
    )


class PagedRunner:
    """One model, its KV pool, and sequences that grow by any number of tokens a step."""

    def __init__(
        self,
        model: Model,
        num_blocks: int = 256,
        backend: type[AttentionBackend] | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """The CPU's own backend has the cache that it needs, others one of float32 in small blocks."""
        self.model = model
        self.device = torch.device(device)
        is_cpu_backend = backend is not None and backend.__module__ == "tabstop.attention.cpu"
        self.block_size = 16 if is_cpu_backend else BLOCK_SIZE
        spec = model.cache_specs[0]
        need = Need(
            num_heads=model.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            kv_dtype=torch.bfloat16 if is_cpu_backend else dtype,
            device=self.device,
            block_size=self.block_size,
        )
        self.attention = make_backend(need) if backend is None else backend(need)
        self.kv = [self.attention.allocate(spec, num_blocks) for spec in model.cache_specs]
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}
        self.lens: dict[int, int] = {}

    def step(self, rows: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """sequence → its next tokens; returns their logits [n, vocab_size]."""
        starts = [self.lens.get(sequence, 0) for sequence in rows]
        for sequence, ids in rows.items():
            self.lens[sequence] = self.lens.get(sequence, 0) + len(ids)
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.block_size < self.lens[sequence]:
                table.append(self.free.pop())
        lens = [len(ids) for ids in rows.values()]
        batch = make_batch([self.tables[sequence] for sequence in rows], starts, lens, self.block_size, self.device)
        positions = [start + offset for start, length in zip(starts, lens, strict=True) for offset in range(length)]
        ids = torch.tensor([token for row in rows.values() for token in row], device=self.device)
        context = StepContext(self.attention, self.attention.plan(batch), self.kv)
        with torch.inference_mode():
            hidden = self.model.forward(ids, torch.tensor(positions, device=self.device), context)
            logits = self.model.logits(hidden)
        return dict(zip(rows, logits.split(lens), strict=True))

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of a whole prompt alone."""
        sequence = -1 - len(self.tables)
        return self.step({sequence: ids})[sequence]

    def forget(self) -> None:
        """Ends all sequences; their blocks are free again, with whatever they hold."""
        for table in self.tables.values():
            self.free += table
        self.tables, self.lens = {}, {}
