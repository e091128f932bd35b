"""What the attention kernels share: the rows that they attend, one step of the online softmax, and their twin in torch.

KV memory of a layer is [blocks, 2, KV heads, block_size, head_dim]: the keys of one head in one block are contiguous.
Scores are kept in powers of two (the scale carries log2 e), and what a query must not see gets a finite MASKED, far
below FLOOR, from which every running maximum starts: a row that has seen nothing yet sums to zero, never to a NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tabstop.kernels.language import jit, tl

LOG2_E = math.log2(math.e)

UNIT = 64
"""Positions; shared prefixes are attended in multiples of it, which are multiples of every kernel's tile."""


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows of T tokens on the device. A row without queries is padding: nothing is read or written for it."""

    starts: torch.Tensor  # int32 [R + 1] first token of each row, and the end of the last
    contexts: torch.Tensor  # int32 [R] tokens of each row's sequence, new ones included
    tables: torch.Tensor  # int32 [R, n] blocks; entries past a context, or before a window, are arbitrary


@dataclass(frozen=True, slots=True)
class Sharing:
    """Prefixes that are attended for a tile of rows at once, each row with one new token; on the device."""

    lens: torch.Tensor  # int32 [R] positions, a multiple of UNIT, that a tile attends for the row; 0: no tile holds it
    tiles: torch.Tensor  # int32 [n, width] rows whose tables begin alike; -1 where a tile has fewer, or none


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled: positions a step, warps a program, steps in flight."""

    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class View:
    """How queries see keys."""

    scale: float
    window: int | None = None  # a query sees only so many positions, its own included


def attend_torch(q: torch.Tensor, kv: torch.Tensor, rows: Rows, view: View) -> torch.Tensor:
    """The twin of both kernels: one row after the other. q [T, heads, dim] → the same shape, padding left at zero."""
    result = torch.zeros_like(q)
    num_kv_heads, block_size = kv.shape[2:4]
    starts, contexts = rows.starts.tolist(), rows.contexts.tolist()
    for row, context in enumerate(contexts):
        first, end = starts[row], starts[row + 1]
        if end == first:
            continue
        oldest = 0 if view.window is None else max(0, context - (end - first) - view.window + 1)
        used = slice(oldest // block_size, -(-context // block_size))
        gathered = kv[rows.tables[row, used].long()].float()  # [blocks, 2, KV heads, block_size, dim]
        keys, values = gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)
        keys, values = (
            x[:, oldest - used.start * block_size : context - used.start * block_size] for x in (keys, values)
        )
        queries = (
            q[first:end].float().view(end - first, num_kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
        )  # [KV heads, group, Q, dim]
        scores = queries @ keys[:, None].transpose(-1, -2) * view.scale
        places = torch.arange(oldest, context, device=q.device)
        position = torch.arange(context - (end - first), context, device=q.device)[:, None]
        hidden = places > position
        if view.window is not None:
            hidden |= places <= position - view.window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        result[first:end] = (weights @ values[:, None]).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return result


@jit()
def load_ids(table: tl.tensor, place: tl.tensor, seen: tl.tensor, BLOCK_SIZE: tl.constexpr) -> tl.tensor:
    """The block of each position of a tile, int32; block 0 for positions that are not read."""
    return tl.load(table + place // BLOCK_SIZE, seen, other=0)


@jit()
def load_tile(
    pointers: tl.tensor, read: tl.tensor, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, EVICT: tl.constexpr
) -> tl.tensor:
    """Keys or values of a tile [N, BLOCK_DIM], zeros where they are not read; read [N, 1], or None for all."""
    if DIM != BLOCK_DIM:
        column = (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
        read = column if read is None else read & column
    if read is None:
        return tl.load(pointers, eviction_policy=EVICT)
    else:  # Triton compiles what follows a return
        return tl.load(pointers, read, other=0.0, eviction_policy=EVICT)


@jit()
def fold(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    visible: tl.tensor,
    scale: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One tile into the online softmax (Milakov and Gimelshein, 2018; Dao, 2023).

    q [M, D] · k, v [N, D] · visible [M, N], None where all see all · the state: maximum [M], sum of weights [M],
    weighted sum of values [M, D].
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if visible is not None:
        scores = tl.where(visible, scores, -1e30)
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None]
    sums = tl.dot(weights.to(v.dtype), v, sums, input_precision="ieee")
    return new_top, total, sums
