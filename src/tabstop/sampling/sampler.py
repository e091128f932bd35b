"""Draws one token for each row of a batch that mixes all kinds of requests.

A sampler is a list of steps, each a function over the logits that names when it is needed; a step costs nothing when no
row uses it. Parameters live per slot on the host (filled at admission), so deciding what is needed never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tabstop.engine.plan import Admission
from tabstop.kernels import sample
from tabstop.sampling.random import uniform


@dataclass(slots=True)
class SamplingBatch:
    """The drawing rows of a step; one entry a row."""

    temperature: np.ndarray  # float32 [N]; 0 = greedy
    top_k: np.ndarray  # int64 [N]; 0 = all
    top_p: np.ndarray  # float32 [N]; 1 = all
    uniform: np.ndarray  # float64 [N] the draw's random number
    masks: np.ndarray | None  # int32 [N, ceil(vocab / 32)] bits of allowed tokens, None when no row has one


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `apply` changes float32 logits [N, vocab], called only when `needed`."""

    needed: Callable[[SamplingBatch], bool]
    apply: Callable[[Tensor, SamplingBatch], Tensor]


def apply_masks(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Forbidden tokens get -inf."""
    assert batch.masks is not None
    bits = np.unpackbits(batch.masks.view(np.uint8), axis=1, bitorder="little", count=logits.shape[1])
    forbidden = _upload(bits, logits.device) == 0
    return logits.masked_fill(forbidden, -torch.inf)


def apply_top_k_top_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Keeps the k likeliest tokens, then the fewest likeliest whose probability reaches p (Holtzman et al., 2020).

    Probabilities are those at the row's temperature. The token that crosses p is kept. Ties at the border follow the
    order of a stable sort. Greedy rows keep their likeliest token, whatever their k and p.
    """
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    top_k = _upload(np.where(batch.top_k > 0, batch.top_k, logits.shape[1]), logits.device)[:, None]
    ordered = ordered.masked_fill(ranks >= top_k, -torch.inf)
    temperature = _upload(np.where(batch.temperature > 0, batch.temperature, 1), logits.device)[:, None]
    probabilities = (ordered.double() / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    top_p = _upload(batch.top_p.astype(np.float64), logits.device)[:, None]
    ordered = ordered.masked_fill((before >= top_p) & (ranks > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, indices, ordered)


STEPS: list[Step] = [
    Step(lambda batch: batch.masks is not None, apply_masks),
    Step(
        lambda batch: bool(((batch.temperature > 0) & ((batch.top_k > 0) | (batch.top_p < 1))).any()), apply_top_k_top_p
    ),
]


def draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The tokens: argmax of greedy rows; of others, the one where the cumulative probability passes the draw's number.

    logits float32 [N, vocab] → int64 [N]. A GPU draws by its own kernel (kernels/sample.py), in float32.
    """
    if logits.is_cuda:
        temperature = _upload(batch.temperature, logits.device)
        return sample.draw(logits, temperature, _upload(batch.uniform.astype(np.float32), logits.device))
    tokens = logits.argmax(-1)
    random_rows = np.flatnonzero(batch.temperature > 0)
    if random_rows.size:
        rows = torch.from_numpy(random_rows)
        temperature, uniform = (torch.from_numpy(of[random_rows]) for of in (batch.temperature, batch.uniform))
        tokens[rows] = sample.draw_torch(logits[rows], temperature, uniform)
    return tokens


def _upload(host: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(host).to(device, non_blocking=True)


class Sampler:
    """Parameters by slot, and the list of steps."""

    def __init__(self, max_num_seqs: int) -> None:
        self.temperature = np.ones(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.uint64)
        self.candidate = np.zeros(max_num_seqs, np.uint64)

    def admit(self, admissions: Iterable[Admission]) -> None:
        for slot, sampling, candidate in admissions:
            self.temperature[slot] = sampling.temperature
            self.top_k[slot] = sampling.top_k
            self.top_p[slot] = sampling.top_p
            self.seed[slot] = sampling.seed % 2**64
            self.candidate[slot] = candidate

    def takes_logits_as_they_are(self, slots: np.ndarray) -> bool:
        """Whether no step is needed for these slots, masks aside: `numbers` are all that their draws need."""
        batch = self._batch(slots, np.zeros(0), None)
        return not any(step.needed(batch) for step in STEPS)

    def numbers(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(temperature, uniform) of slots and of the positions of their tokens to draw, float32 [N] each."""
        return self.temperature[slots], self._uniform(slots, positions).astype(np.float32)

    def sample(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray, masks: np.ndarray | None) -> Tensor:
        """logits float32 [N, vocab], slots and positions of the tokens to draw int64 [N] → int64 [N]."""
        batch = self._batch(slots, self._uniform(slots, positions), masks)
        for step in STEPS:
            if step.needed(batch):
                logits = step.apply(logits, batch)
        return draw(logits, batch)

    def _batch(self, slots: np.ndarray, uniform: np.ndarray, masks: np.ndarray | None) -> SamplingBatch:
        return SamplingBatch(self.temperature[slots], self.top_k[slots], self.top_p[slots], uniform, masks)

    def _uniform(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return uniform(self.seed[slots], self.candidate[slots], positions.astype(np.uint64))
