"""Rotary position embeddings (Su et al., 2021): variants are functions of the config to one frequency for each pair."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from tabstop.models.config import Divisors, LinearScaling, Llama3Scaling, RopeConfig


class Rotary(NamedTuple):
    """Cosines and sines of a step's positions, [T, 1, head_dim / 2]; shared by all layers and heads."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rope(nn.Module):
    """Positions → angles, computed once a step."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.frequencies = frequencies(config, head_dim)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """positions int64 [T] → cosines and sines in `dtype`; the angles are float32."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions.float()[:, None, None] * self.frequencies
        return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a position for each pair of dimensions (i, i + head_dim / 2), float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    plain = 1.0 / torch.pow(config.theta, exponents)
    match config.scaling:
        case None:
            return plain
        case LinearScaling(factor):
            return plain / factor
        case Divisors(values):
            return plain / torch.tensor(values, dtype=torch.float32, device="cpu")
        case Llama3Scaling():
            return llama3_frequencies(plain, config.scaling)


def llama3_frequencies(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Llama 3.1's scaling by wavelength.

    A pair that turns at least `high_freq_factor` times within the original context keeps its frequency; one that turns
    at most `low_freq_factor` times is slowed by `factor`; between, the weight of the kept frequency grows linearly with
    the number of turns.
    """
    turns = scaling.original_context * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns the pairs (i, i + dim / 2) of x [T, heads, dim] by each token's angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
