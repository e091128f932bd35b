"""Top-k and top-p by quartering, against the twin that sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tabstop.kernels import likeliest
from tabstop.sampling.likeliest import keep_by_sorting
from tests.kernels.rows import DEVICE
from tests.sampling.test_likeliest import batch_of, random_parameters


@pytest.mark.parametrize(("kind", "vocab"), [("random", 300), ("ties", 250), ("flat", 128), ("few allowed", 130)])
def test_quartering_keeps_what_sorting_keeps(kind: str, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeliest, "CHUNK", 128)  # so that a row has several
    generator, num_rows = np.random.default_rng(7), 8
    logits = torch.from_numpy(generator.normal(size=(num_rows, vocab)).astype(np.float32)) * 2
    if kind == "ties":
        logits = logits.round()
        logits[::2] *= -1  # zeros of both signs
    elif kind == "flat":
        logits *= 0.01
    elif kind == "few allowed":
        logits[:, 30:] = -torch.inf
    batch = batch_of(random_parameters(num_rows, vocab, generator))
    numbers = {name: batch.column(name, DEVICE)[:, 0] for name in ("temperature", "top_p")}
    top_k = batch.column("top_k", DEVICE)[:, 0].int()
    kept = logits.to(DEVICE, copy=True)
    rows = torch.tensor([0, 2, 3, 7, 6, 5], device=DEVICE)
    top_k = torch.where(top_k > 0, top_k, vocab).int()
    likeliest.keep_triton(kept, rows, *(each[rows] for each in (numbers["temperature"], top_k, numbers["top_p"])))
    expected = keep_by_sorting(logits, batch)
    expected[[1, 4]] = logits[[1, 4]]
    assert torch.equal(kept.cpu(), expected)
