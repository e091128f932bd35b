"""What the model thought of drawn tokens: log-probabilities at temperature 1, before anything the sampler does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tabstop.sampling.steps import ROWS_AT_ONCE
from tabstop.types import TokenLogprobs


@dataclass(slots=True)
class Reported:
    """Of M rows, on the device or on its way to the host."""

    rows: np.ndarray  # int64 [M] which of the drawing rows
    wanted: np.ndarray  # int64 [M] how many likeliest tokens each asked for
    floats: Tensor  # float32 [M, 1 + most]: the drawn token's, then the likeliest tokens'
    ids: Tensor  # int64 [M, 1 + most]: the drawn token's rank, then the likeliest tokens

    def entries(self) -> dict[int, TokenLogprobs]:
        """By drawing row. For tensors on the host."""
        found = {}
        lists = (self.rows.tolist(), self.wanted.tolist(), self.floats.tolist(), self.ids.tolist())
        for row, num_wanted, floats, ids in zip(*lists, strict=True):
            found[row] = TokenLogprobs(floats[0], ids[0], ids[1 : 1 + num_wanted], floats[1 : 1 + num_wanted])
        return found


def report(logits: Tensor, tokens: Tensor, places: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """`floats` and `ids` of Reported. float32 logits [R, vocab], int64 tokens [R], places of the M rows in them."""
    parts = [_report(logits.index_select(0, some), tokens[some], most) for some in torch.split(places, ROWS_AT_ONCE)]
    floats, ids = zip(*parts, strict=True)
    return torch.cat(floats), torch.cat(ids)


def _report(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
    total = logits.logsumexp(-1, keepdim=True)
    drawn = logits.gather(1, tokens[:, None])
    rank = 1 + (logits > drawn).sum(-1, keepdim=True)
    top, ids = logits.topk(min(most, logits.shape[1]), dim=-1)
    return torch.cat([drawn, top], 1) - total, torch.cat([rank, ids], 1)
