"""Ids that a step is fed before the host knows them: the tokens that the step before drew."""

from __future__ import annotations

import torch

from tabstop.kernels.language import ceil_div, early, follow, jit, tl

BLOCK = 1024  # ids a program


def known_ids(ids: torch.Tensor, last_ids: torch.Tensor) -> torch.Tensor:
    """int64 [T] → int64 [T]: where an id is -1 - slot, last_ids[slot]."""
    return known_ids_triton(ids, last_ids) if ids.is_cuda else known_ids_torch(ids, last_ids)


def known_ids_torch(ids: torch.Tensor, last_ids: torch.Tensor) -> torch.Tensor:
    return torch.where(ids < 0, last_ids[(-1 - ids).clamp(min=0)], ids)


def known_ids_triton(ids: torch.Tensor, last_ids: torch.Tensor) -> torch.Tensor:
    known = torch.empty_like(ids)
    if len(ids):
        _kernel[(ceil_div(len(ids), BLOCK),)](ids, last_ids, known, len(ids), BLOCK, num_warps=4, **early(ids))
    return known


@jit("num_ids")
def _kernel(
    ids: tl.tensor,
    last_ids: tl.tensor,
    known: tl.tensor,
    num_ids: tl.tensor,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program a block of ids."""
    follow(EARLY)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_ids
    given = tl.load(ids + place, inside, other=0)
    drawn = tl.load(last_ids + (-1 - given), inside & (given < 0), other=0)
    tl.store(known + place, tl.where(given < 0, drawn, given), inside)
