"""Draws against the twin, and the twin against the plain sampler's rule."""

from __future__ import annotations

import pytest
import torch

from tabstop.kernels.sample import draw_blocks, draw_torch, draw_triton
from tests.kernels.rows import DEVICE


def make_logits(num_rows: int, vocab: int) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)).to(DEVICE) * 4


def slack(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor, tokens: torch.Tensor) -> float:
    """How far the random numbers lie outside the drawn tokens' shares of the cumulative distribution."""
    probabilities = (logits.double() / temperature.double()[:, None]).softmax(-1)
    after = probabilities.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    share = probabilities.gather(1, tokens[:, None])[:, 0]
    assert (share > 0).all()
    return float(torch.maximum(after - share - uniform, uniform - after).max())


@pytest.mark.parametrize("vocab", [1, 300, 4096, 10000])
def test_the_likeliest_of_equals_is_the_first(vocab: int) -> None:
    logits = make_logits(4, vocab).round()
    zeros = torch.zeros(4, device=DEVICE)
    tokens = draw_triton(logits, zeros, zeros + 0.9)
    assert torch.equal(tokens, draw_torch(logits, zeros, zeros))
    assert torch.equal(tokens, draw_blocks(logits, zeros, zeros))
    assert torch.equal(tokens.cpu(), logits.cpu().argmax(-1))


@pytest.mark.parametrize("vocab", [2, 300, 10000])
def test_draws_follow_the_cumulative_distribution(vocab: int) -> None:
    logits = make_logits(12, vocab)
    temperature = torch.tensor([0.3, 1.0, 2.5] * 4, device=DEVICE)
    uniform = torch.linspace(0, 1 - 2**-24, 12, device=DEVICE)
    tokens = draw_triton(logits, temperature, uniform)
    assert slack(logits, temperature, uniform, tokens) < 1e-5
    assert slack(logits, temperature, uniform, draw_torch(logits, temperature, uniform)) < 1e-6
    assert slack(logits, temperature, uniform, draw_blocks(logits, temperature, uniform)) < 1e-6


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((5, 9000), -torch.inf, device=DEVICE)
    logits[:, 4095], logits[:, 8000] = 1.0, 1.0
    logits[3:, 4095] = -torch.inf
    temperature = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)
    uniform = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0], device=DEVICE)
    for draw in (draw_triton, draw_blocks, draw_torch):
        assert draw(logits, temperature, uniform).tolist() == [4095, 8000, 4095, 8000, 8000]


def test_the_largest_random_number_stays_inside_the_allowed_tokens() -> None:
    logits = make_logits(6, 5000)
    logits[:, 3000:] = -torch.inf
    logits[:, 2990:3000:2] = -200  # their weights round to nothing
    ones, most = torch.ones(6, device=DEVICE), torch.full((6,), 1 - 2**-24, device=DEVICE)
    for draw in (draw_triton, draw_blocks, draw_torch):
        tokens = draw(logits, ones, most)
        assert (logits.gather(1, tokens[:, None]) > -200).all()


def test_rows_of_a_wider_matrix() -> None:
    logits = make_logits(3, 600)[:, :500]
    zeros = torch.zeros(3, device=DEVICE)
    assert torch.equal(draw_triton(logits, zeros, zeros), logits.argmax(-1))
