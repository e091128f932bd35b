"""The steps of a sampler: which rows need one, and how it changes their logits.

Each sees only the rows that need it, at most ROWS_AT_ONCE of them (or, in place on a card, all), and gives logits of
the same shape. None waits for the device: no `.item()`, no indexing by masks that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tabstop.sampling.batch import SamplingBatch, pad_ids
from tabstop.sampling.history import upload
from tabstop.sampling.likeliest import apply_top_k_top_p, keep_likeliest_on_card

ROWS_AT_ONCE = 64
"""Sorted logits, their places and float64 probabilities take ten times what logits take."""

NEVER = -1e9
"""Added to the logits of stop tokens that are not due. Not -inf: a mask may allow nothing else."""


@dataclass(frozen=True, slots=True)
class Step:
    """`rows`: bool [N], the rows that need it. `apply`: float32 logits [n, vocab] of those → the same, changed.

    It may change them where they are. `on_card`, where there is one, does so on a GPU: to float32 logits [N, vocab], of
    which it changes the rows int64 [n] that the batch is of, any number.
    """

    rows: Callable[[SamplingBatch], np.ndarray]
    apply: Callable[[Tensor, SamplingBatch], Tensor]
    on_card: Callable[[Tensor, Tensor, SamplingBatch], None] | None = None


def apply_masks(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Forbidden tokens get -inf. Masks travel packed."""
    assert batch.masks is not None
    return (forbid_torch if logits.is_cuda else forbid_numpy)(logits, batch.masks)


def forbid_torch(logits: Tensor, masks: np.ndarray) -> Tensor:
    """int32 masks [n, words] → new logits with -inf where a bit is not set. The twin of forbid_numpy."""
    words = upload(masks, logits.device)
    bits = (words[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32)) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def forbid_numpy(logits: Tensor, masks: np.ndarray) -> Tensor:
    """The same in place on a CPU, at a tenth of the time: torch has no packed bits there."""
    bits = np.unpackbits(~masks.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
    np.copyto(logits.numpy(), -np.inf, where=bits.view(np.bool_))
    return logits


def apply_allowed(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """All but the allowed ids get -inf."""
    ids = pad_ids([batch.lists.allowed[slot] for slot in batch.slots.tolist()], logits.shape[1])
    return logits.masked_fill(~_marked(upload(ids, logits.device), logits.shape[1]), -torch.inf)


def apply_banned_runs(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The last token of a banned run gets -inf where the output ends with the tokens before it."""
    vocab, device = logits.shape[1], logits.device
    runs = upload(pad_ids([batch.lists.banned_runs[slot] for slot in batch.slots.tolist()], -1), device)
    length = runs.shape[2] - 1
    tokens = batch.history.read(batch.slots, int(batch.positions.max()))
    places = upload(batch.positions, device)[:, None] + torch.arange(-length, 0, device=device)
    is_output = places >= batch.column("prompt_end", device)
    tail = torch.where(is_output, tokens.gather(1, places.clamp(min=0)), -2)
    starts, ends = runs[:, :, :-1], runs[:, :, -1]
    is_met = ((starts == -1) | (starts == tail[:, None])).all(-1) & (ends >= 0)
    return logits.masked_fill(_marked(torch.where(is_met, ends, vocab), vocab), -torch.inf)


def apply_stop_bans(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Stop tokens do not come before min_tokens others have."""
    ids = [batch.lists.stops[slot] for slot in batch.slots.tolist()]
    never = [np.full(len(entry), NEVER, np.float32) for entry in ids]
    return _add_at(logits, ids, never)


def apply_bias(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Adds to single logits; banned ids get -inf."""
    ids, values = zip(*(batch.lists.biases[slot] for slot in batch.slots.tolist()), strict=True)
    return _add_at(logits, list(ids), list(values))


def apply_penalties(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Repetition (Keskar et al., CTRL, 2019) over prompt and output, presence and frequency (OpenAI's) over the output.

    With a window all three look at so many last tokens of both, as llama.cpp's do.
    """
    vocab, device = logits.shape[1], logits.device
    numbers = batch.parameters
    window_start = np.maximum(batch.positions - numbers["penalty_window"], 0)
    has_window = numbers["penalty_window"] > 0
    first_seen = upload(np.where(has_window, window_start, 0), device)[:, None]
    first_counted = upload(np.where(has_window, window_start, numbers["prompt_end"]), device)[:, None]
    ids = batch.history.read(batch.slots, int(batch.positions.max()))
    place = torch.arange(ids.shape[1], device=device)
    is_known = place < upload(batch.positions, device)[:, None]
    seen = _marked(torch.where(is_known & (place >= first_seen), ids, vocab), vocab)
    counted = torch.where(is_known & (place >= first_counted), ids, vocab)
    counts = logits.new_zeros(len(logits), vocab + 1)
    counts = counts.scatter_add_(1, counted, torch.ones_like(counted, dtype=torch.float32))[:, :vocab]
    repetition = batch.column("repetition_penalty", device)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits = logits - batch.column("frequency_penalty", device) * counts
    return logits - batch.column("presence_penalty", device) * (counts > 0)


def apply_min_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Forbids what is less likely than min_p times the likeliest token (Nguyen et al., 2024), at that temperature."""
    scaled = logits.double() / batch.column("temperature", logits.device)
    least = scaled.amax(-1, keepdim=True) + batch.column("min_p", logits.device).log()
    return logits.masked_fill(scaled < least, -torch.inf)


def apply_typical_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Keeps the fewest tokens, most typical first, whose probability reaches p (Meister et al., 2022).

    Typical is what surprises as much as the distribution does on average, at the row's temperature.
    """
    logs = (logits.double() / batch.column("temperature", logits.device)).log_softmax(-1)
    probabilities = logs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * logs, 0.0).sum(-1, keepdim=True)
    order = (-logs - entropy).abs().argsort(stable=True, dim=-1)
    ordered = probabilities.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    ranks = torch.arange(logits.shape[1], device=logits.device)
    forbidden = (before >= batch.column("typical_p", logits.device)) & (ranks > 0)
    return logits.masked_fill(torch.empty_like(forbidden).scatter_(-1, order, forbidden), -torch.inf)


def _marked(ids: Tensor, vocab: int) -> Tensor:
    """int64 [n, m] of 0 to vocab → bool [n, vocab]: which ids are there; `vocab` is none."""
    return torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)[:, :vocab]


def _add_at(logits: Tensor, ids: list[np.ndarray], values: list[np.ndarray]) -> Tensor:
    """Rows' values added at their ids. A row that has fewer adds 0 at id 0."""
    device = logits.device
    return logits.scatter_add(1, upload(pad_ids(ids, 0), device), upload(pad_ids(values, 0.0), device))


def _has_mask(batch: SamplingBatch) -> np.ndarray:
    return np.zeros(len(batch.slots), np.bool_) if batch.masks is None else (batch.masks != -1).any(1)


def _has_penalty(batch: SamplingBatch) -> np.ndarray:
    numbers = batch.parameters
    repeats = numbers["repetition_penalty"] != 1
    return np.asarray(repeats | (numbers["presence_penalty"] != 0) | (numbers["frequency_penalty"] != 0))


def _is_random_and(needed: Callable[[np.ndarray], np.ndarray]) -> Callable[[SamplingBatch], np.ndarray]:
    """Greedy rows keep their likeliest token, whatever is cut around it."""
    return lambda batch: np.asarray((batch.parameters["temperature"] > 0) & needed(batch.parameters))


STEPS: list[Step] = [
    Step(_has_mask, apply_masks),
    Step(lambda batch: np.asarray(batch.parameters["has_allowed"]), apply_allowed),
    Step(lambda batch: np.asarray(batch.parameters["has_banned_runs"]), apply_banned_runs),
    Step(lambda batch: np.asarray(batch.positions < batch.parameters["stoppable_from"]), apply_stop_bans),
    Step(lambda batch: np.asarray(batch.parameters["has_bias"]), apply_bias),
    Step(_has_penalty, apply_penalties),
    Step(_is_random_and(lambda numbers: numbers["min_p"] > 0), apply_min_p),
    Step(
        _is_random_and(lambda numbers: (numbers["top_k"] > 0) | (numbers["top_p"] < 1)),
        apply_top_k_top_p,
        keep_likeliest_on_card,
    ),
    Step(_is_random_and(lambda numbers: numbers["typical_p"] < 1), apply_typical_p),
]
"""In this order, which is that of most servers: what is allowed, biases, penalties, then what cuts the distribution."""
