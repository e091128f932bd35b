"""Growing sequences that several backends step through alike."""

from __future__ import annotations

import random

import torch

from tabstop.attention import AttentionBackend, AttentionBatch, Need
from tabstop.cache import CacheKind, CacheSpec
from tests.models.paged import make_batch

STEPS = [[30, 1, 9, 300], [1, 1, 1, 1], [5, 1, 40, 2], [8, 600, 7, 1], [2, 2, 2, 2], [1, 1, 1, 1]]
NUM_BLOCKS = 260


class Steps:
    """Four sequences in shuffled blocks, stepped through by several backends alike."""

    def __init__(self, need: Need) -> None:
        self.need = need
        blocks = random.Random(1).sample(range(NUM_BLOCKS), 4 * 60)
        self.tables = [blocks[60 * row : 60 * row + 60] for row in range(4)]
        self.lens = [0, 0, 0, 0]

    def next(self, lens: list[int]) -> tuple[AttentionBatch, list[torch.Tensor]]:
        """The step's rows, and its q, k and v."""
        batch = make_batch(self.tables, self.lens, lens, self.need.block_size)
        self.lens = [start + length for start, length in zip(self.lens, lens, strict=True)]
        generator = torch.Generator().manual_seed(sum(self.lens))
        counts = [self.need.num_heads, self.need.num_kv_heads, self.need.num_kv_heads]
        qkv = torch.randn(sum(lens), sum(counts), self.need.head_dim, generator=generator)
        return batch, list(qkv.bfloat16().float().split(counts, dim=1))


def allocate(backend: AttentionBackend, need: Need) -> torch.Tensor:
    kv: torch.Tensor = backend.allocate(CacheSpec(CacheKind.PAGED, need.num_kv_heads, need.head_dim), NUM_BLOCKS)
    return kv
