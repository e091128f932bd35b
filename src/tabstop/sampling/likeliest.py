"""Top-k and top-p: which tokens are likely enough to be drawn.

The plain way sorts the vocabulary, which on a CPU takes longer than a small model's whole step. Nearly always a few
hundred tokens hold what is kept: there the border is found among those, then among more, and only then by sorting. A
card finds it by a kernel of its own (kernels/likeliest.py), since nothing there may wait for what was found.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tabstop.kernels.likeliest import keep_triton
from tabstop.sampling.batch import SamplingBatch
from tabstop.sampling.history import upload

NUM_CANDIDATES = 256
WIDER = 8  # times as many are looked at next


def apply_top_k_top_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Keeps the k likeliest tokens, then the fewest likeliest whose probability reaches p (Holtzman et al., 2020).

    Probabilities are those at the row's temperature. The token that crosses p is kept. Ties at the border follow the
    order of a stable sort.
    """
    if logits.shape[1] <= NUM_CANDIDATES:
        return keep_by_sorting(logits, batch)
    return keep_by_border(logits, batch, NUM_CANDIDATES)


def keep_likeliest_on_card(logits: Tensor, rows: Tensor, batch: SamplingBatch) -> None:
    """The same in place, of those rows, int64 [n] on the device, which the batch has."""
    temperature, top_p = (batch.column(name, logits.device)[:, 0] for name in ("temperature", "top_p"))
    keep_triton(logits, rows, temperature, upload(_top_k(logits, batch).astype(np.int32), logits.device), top_p)


def keep_by_sorting(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The twin of keep_by_border."""
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= upload(_top_k(logits, batch), logits.device)[:, None], -torch.inf)
    probabilities = (ordered.double() / batch.column("temperature", logits.device)).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    top_p = batch.column("top_p", logits.device)
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1) & (ranks > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, indices, ordered)


def keep_by_border(logits: Tensor, batch: SamplingBatch, num_candidates: int) -> Tensor:
    """The same, of each row by the logit of the last token that it keeps, sought among the `num_candidates` likeliest.

    A row's result does not depend on others.
    """
    temperature, top_p = (batch.column(name, logits.device) for name in ("temperature", "top_p"))
    top_k = torch.from_numpy(_top_k(logits, batch))[:, None]
    values = logits.topk(num_candidates, dim=-1).values
    ranks = torch.arange(num_candidates)
    weights = ((values.double() - values[:, :1]) / temperature).exp().masked_fill(ranks >= top_k, 0.0)
    cumulative = weights.cumsum(-1)
    total, before = cumulative[:, -1:].clone(), cumulative - weights
    everything = (top_k[:, 0] >= logits.shape[1]).nonzero()[:, 0]
    if len(everything):
        total[everything, 0] = _whole(logits[everything], temperature[everything])
    is_kept = (((before < top_p * total) | (top_p >= 1)) & (ranks < top_k)) | (ranks == 0)
    num_kept = is_kept.sum(-1)
    border = values.gather(1, num_kept[:, None] - 1)
    is_below = logits < border
    result = logits.masked_fill(is_below, -torch.inf)
    is_beyond = (top_k[:, 0] > num_candidates) & ((top_k[:, 0] < logits.shape[1]) | (num_kept == num_candidates))
    is_tied = (torch.count_nonzero(is_below, dim=-1) < logits.shape[1] - num_kept) & (border[:, 0] > -torch.inf)
    wider = num_candidates * WIDER
    for rows, by_border in ((is_beyond, wider * WIDER <= logits.shape[1]), (is_tied & ~is_beyond, False)):
        places = rows.nonzero()[:, 0]
        if len(places):
            some, part = logits[places], batch.part(places.numpy())
            result[places] = keep_by_border(some, part, wider) if by_border else keep_by_sorting(some, part)
    return result


def _top_k(logits: Tensor, batch: SamplingBatch) -> np.ndarray:
    """int64 [n], at most the vocabulary's size."""
    top_k, vocab = batch.parameters["top_k"], logits.shape[1]
    return np.where(top_k > 0, np.minimum(top_k, vocab), vocab).astype(np.int64)


def _whole(logits: Tensor, temperature: Tensor) -> Tensor:
    """The sum of all weights exp((logit - the largest) / temperature), float64 [n]; each is rounded to float32."""
    weights = (logits - logits.amax(-1, keepdim=True)).div_(temperature.float()).exp_()
    return weights.sum(-1).double()
