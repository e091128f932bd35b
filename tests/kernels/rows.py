"""Random rows over paged KV memory in which everything that must not be read is NaN."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tabstop.kernels.attention import Rows, Sharing
from tests.kernels.interpreter import repair

repair()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

HALVES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
"""The interpreter multiplies matrices of bfloat16 as if their bits were integers, and rounds towards zero."""


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def make_rows(
    shape: Shape, lens: Sequence[int], contexts: Sequence[int], window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """(q, kv, rows); a row's blocks lie anywhere, and only what its queries may see is no NaN."""
    generator = torch.Generator().manual_seed(sum(contexts))
    size = shape.block_size
    counts = [-(-context // size) for context in contexts]
    free = list(range(sum(counts) + 3))
    random.Random(0).shuffle(free)
    tables = torch.full((len(lens), max(counts) + 2), -7, dtype=torch.int32)
    kv = torch.full((len(free), 2, shape.kv_heads, size, shape.dim), torch.nan)
    for row, (length, context) in enumerate(zip(lens, contexts, strict=True)):
        oldest = 0 if window is None else max(0, context - length - window + 1)
        for index in range(oldest // size, counts[row] if length else 0):
            block = free.pop()
            tables[row, index] = block
            seen = slice(max(0, oldest - index * size), min(size, context - index * size))
            values = torch.randn(2, shape.kv_heads, size, shape.dim, generator=generator)
            kv[block, :, :, seen] = values[:, :, seen]
    starts = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(sum(lens), shape.heads, shape.dim, generator=generator)
    rows = Rows(starts.to(DEVICE), torch.tensor(contexts, dtype=torch.int32).to(DEVICE), tables.to(DEVICE))
    return q.to(DEVICE, shape.dtype), kv.to(DEVICE, shape.dtype), rows


def share(kv: torch.Tensor, rows: Rows, groups: Sequence[tuple[Sequence[int], int]], width: int) -> Sharing:
    """Gives each group of rows the same first so many positions; the blocks that they had there become NaN."""
    shared, tiles = torch.zeros(len(rows.contexts), dtype=torch.int32), []
    for members, length in groups:
        blocks = length // kv.shape[3]
        kv[rows.tables[members[1:], :blocks].flatten().long()] = torch.nan
        rows.tables[members, :blocks] = rows.tables[members[0], :blocks]
        shared[members] = length
        for first in range(0, len(members), width):
            tile = list(members[first : first + width])
            tiles.append(tile + [-1] * (width - len(tile)))
    tiles.append([-1] * width)
    return Sharing(shared.to(DEVICE), torch.tensor(tiles, dtype=torch.int32).to(DEVICE))
