"""Top-k and top-p by their border, against its twin that sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tabstop.engine.plan import Admission
from tabstop.sampling import likeliest
from tabstop.sampling.batch import SamplingBatch
from tabstop.sampling.likeliest import keep_by_border, keep_by_sorting
from tabstop.sampling.sampler import Sampler
from tabstop.types import Sampling


def batch_of(samplings: list[Sampling]) -> SamplingBatch:
    sampler, slots = Sampler(len(samplings)), np.arange(len(samplings))
    sampler.admit(Admission(slot, sampling, 0) for slot, sampling in enumerate(samplings))
    return sampler._batch(slots, np.zeros(len(samplings), np.int64), None)


def random_parameters(num_rows: int, vocab: int, generator: np.random.Generator) -> list[Sampling]:
    """All kinds beside each other: only k, only p, both, neither."""
    top_k = generator.choice([0, 0, 1, 7, 40, 100, 300, vocab], num_rows)
    top_p = generator.choice([1.0, 1e-6, 0.5, 0.9, 0.999], num_rows)
    temperature = generator.choice([0.2, 1.0, 3.0], num_rows)
    numbers = zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    return [Sampling(temperature=t, top_k=k, top_p=p, seed=1) for t, k, p in numbers]


@pytest.mark.parametrize("kind", ["random", "ties", "flat", "few allowed"])
def test_the_border_keeps_what_sorting_keeps(kind: str) -> None:
    """Ties at the border, borders beyond the candidates, and fewer allowed tokens than k."""
    generator, vocab, num_rows = np.random.default_rng(5), 700, 64
    logits = torch.from_numpy(generator.normal(size=(num_rows, vocab)).astype(np.float32)) * 2
    if kind == "ties":
        logits = logits.round()
    elif kind == "flat":
        logits *= 0.01
    elif kind == "few allowed":
        logits[:, 30:] = -torch.inf
    for num_candidates in (4, 16, 256):
        batch = batch_of(random_parameters(num_rows, vocab, generator))
        kept = keep_by_border(logits, batch, num_candidates)
        assert torch.equal(kept, keep_by_sorting(logits, batch))
        for row in range(0, num_rows, 7):
            alone = keep_by_border(logits[row : row + 1], batch.part(np.array([row])), num_candidates)
            assert torch.equal(kept[row : row + 1], alone)


def test_few_rows_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: of rows as models make them, none."""
    logits = torch.from_numpy(np.random.default_rng(6).normal(size=(32, 5000)).astype(np.float32)) * 3
    samplings = [Sampling(temperature=0.8, top_p=0.95, seed=1), Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1)]
    batch = batch_of(samplings * 16)
    num_sorted = []

    def sort(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
        num_sorted.append(len(logits))
        return keep_by_sorting(logits, batch)

    monkeypatch.setattr(likeliest, "keep_by_sorting", sort)
    likeliest.apply_top_k_top_p(logits, batch)
    assert not num_sorted
    likeliest.apply_top_k_top_p(logits * 0.001, batch)
    assert num_sorted == [16]  # of flat distributions those without a k
