"""The sampler against plain references in float64, and that neighbours do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tabstop.engine.plan import Admission
from tabstop.sampling.random import uniform
from tabstop.sampling.sampler import Sampler
from tabstop.types import Sampling

VOCAB = 50


def reference_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """float64 [vocab] → the probabilities that a row is drawn from, by the definitions."""
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    keep = np.zeros(len(logits), bool)
    if sampling.top_k:
        order = order[: sampling.top_k]
        probabilities = probabilities / probabilities[order].sum()
    total = 0.0
    for token in order:
        keep[token] = True
        total += probabilities[token]
        if total >= sampling.top_p:
            break
    kept = np.where(keep, probabilities, 0)
    return kept / kept.sum()


def sample_rows(logits: torch.Tensor, samplings: list[Sampling], positions: np.ndarray, masks=None) -> np.ndarray:
    sampler = Sampler(len(samplings))
    sampler.admit(Admission(slot, sampling, 0) for slot, sampling in enumerate(samplings))
    return sampler.sample(logits, np.arange(len(samplings)), positions, masks).numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.3, seed=2),
        Sampling(temperature=1.5, seed=3, top_k=7),
        Sampling(temperature=1.0, seed=4, top_p=0.6),
        Sampling(temperature=0.8, seed=5, top_k=10, top_p=0.9),
    ],
)
def test_draws_follow_the_reference_distribution(sampling):
    """Chi-square on 100,000 draws; the bound is the 99.99 % quantile (normal approximation)."""
    num_draws, rows = 100_000, 500
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2
    counts = np.zeros(VOCAB)
    for first in range(0, num_draws, rows):
        repeated = torch.from_numpy(logits).repeat(rows, 1)
        drawn = sample_rows(repeated, [sampling] * rows, np.arange(first, first + rows))
        counts += np.bincount(drawn, minlength=VOCAB)
    expected = reference_distribution(logits, sampling) * num_draws
    assert (counts[expected == 0] == 0).all()
    seen = expected >= 5
    statistic = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    degrees = seen.sum() - 1
    assert statistic < degrees + 3.72 * np.sqrt(2 * degrees) + 10


def test_greedy_is_exact_beside_random_rows():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(temperature=t, seed=3, top_k=k) for t, k in [(0, 0), (1, 5), (0, 3), (0.5, 0), (0, 0), (2, 0)]
    ]
    drawn = sample_rows(logits, samplings, np.arange(6))
    for row in (0, 2, 4):
        assert drawn[row] == logits[row].argmax()


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(temperature=1, seed=n, top_k=n % 3 * 4, top_p=1 - n / 20) for n in range(8)]
    together = sample_rows(logits, samplings, np.arange(8))
    for row in range(8):
        alone = sample_rows(logits[row : row + 1], samplings[row : row + 1], np.arange(row, row + 1))
        assert alone[0] == together[row]


def test_a_draw_depends_on_seed_candidate_and_position():
    base = (3, 1, 10)
    numbers = {
        tuple(c): uniform(*(np.array([x], np.uint64) for x in c))[0] for c in [base, (4, 1, 10), (3, 2, 10), (3, 1, 11)]
    }
    assert len(set(numbers.values())) == 4
    many = uniform(np.full(100_000, 7, np.uint64), np.zeros(100_000, np.uint64), np.arange(100_000, dtype=np.uint64))
    assert abs(many.mean() - 0.5) < 0.005 and abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.01


def test_masks_forbid_tokens_of_their_row_only():
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 10
    masks = np.full((2, 2), -1, np.int32)
    masks[0] = [1 << 9, 0]
    drawn = sample_rows(logits, [Sampling(temperature=1, seed=1)] * 2, np.zeros(2, np.int64), masks)
    assert drawn.tolist() == [9, 7]


def test_the_largest_random_number_stays_inside_the_allowed_tokens(monkeypatch):
    """Rounding at the end of the cumulative sum must not draw a forbidden last token."""
    monkeypatch.setattr("tabstop.sampling.sampler.uniform", lambda *_: np.array([1 - 2**-53]))
    logits = torch.zeros(1, VOCAB)
    logits[0, 30:] = -torch.inf
    assert sample_rows(logits, [Sampling(temperature=1)], np.zeros(1, np.int64))[0] == 29


def test_a_row_without_a_distribution_still_draws_from_the_vocabulary():
    """What overflowed, or a mask that allows nothing: the token is fed to the model, so it must be one."""
    logits = torch.zeros(3, VOCAB)
    logits[0], logits[1] = torch.nan, -torch.inf
    logits[2, 5] = 100
    drawn = sample_rows(logits, [Sampling(temperature=1, seed=1)] * 3, np.zeros(3, np.int64))
    assert drawn.min() >= 0 and drawn.max() < VOCAB and drawn[2] == 5
