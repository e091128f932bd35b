"""What the model thought of tokens, drawn or of a prompt: log-probabilities at temperature 1, before anything that the
sampler does. Logits are looked at a fixed number of rows at a time, so a prompt's never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tabstop.sampling.steps import ROWS_AT_ONCE
from tabstop.types import TokenLogprobs


@dataclass(slots=True)
class Reported:
    """Of M tokens, on the device or on its way to the host."""

    rows: np.ndarray  # int64 [M] of which row each is: of those that draw, or of a plan's
    wanted: np.ndarray  # int64 [M] how many likeliest tokens each asked for
    floats: Tensor  # float32 [M, 1 + most]: the token's, then the likeliest tokens'
    ids: Tensor  # int64 [M, 1 + most]: the token's rank, then the likeliest tokens

    def entries(self) -> dict[int, list[TokenLogprobs]]:
        """By row, in order. For tensors on the host."""
        found: dict[int, list[TokenLogprobs]] = {}
        lists = (self.rows.tolist(), self.wanted.tolist(), self.floats.tolist(), self.ids.tolist())
        for row, num_wanted, floats, ids in zip(*lists, strict=True):
            entry = TokenLogprobs(floats[0], ids[0], ids[1 : 1 + num_wanted], floats[1 : 1 + num_wanted])
            found.setdefault(row, []).append(entry)
        return found


def report(logits_of: Callable[[Tensor], Tensor], places: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`floats` and `ids` of Reported. int64 places [M], tokens [M]; `logits_of`: places [n] → float32 [n, vocab]."""
    slices = (torch.split(each, ROWS_AT_ONCE) for each in (places, tokens))
    parts = [_report(logits_of(some), their_tokens, most) for some, their_tokens in zip(*slices, strict=True)]
    floats, ids = zip(*parts, strict=True)
    return torch.cat(floats), torch.cat(ids)


def _report(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, tokens[:, None])
    rank = 1 + (logits > own).sum(-1, keepdim=True)
    top, ids = logits.topk(min(most, logits.shape[1]), dim=-1)
    return torch.cat([own, top], 1) - total, torch.cat([rank, ids], 1)
