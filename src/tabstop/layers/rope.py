"""Rotary position embeddings (Su et al., 2021): variants are functions of the config to one frequency for each pair."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from tabstop.models.rope import Divisors, LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


class Rotary(NamedTuple):
    """Cosines and sines of a step's positions, [T, 1, head_dim / 2]; shared by all layers and heads."""

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None = None  # [T, 1, 1], for families whose queries grow with their position


class Rope(nn.Module):
    """Positions → angles, computed once a step. What is not turned has the angle 0 (layers/projections.py)."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        num_unturned = (head_dim - config.rotary_dim) // 2
        self.frequencies = functional.pad(frequencies(config), (0, num_unturned))
        turned = torch.full((config.rotary_dim // 2,), magnitude(config), device="cpu")
        self.magnitudes = functional.pad(turned, (0, num_unturned), value=1.0)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """positions int64 [T] → cosines and sines in `dtype`; the angles are float32."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
            self.magnitudes = self.magnitudes.to(positions.device)
        angles = positions.float()[:, None, None] * self.frequencies
        return Rotary((angles.cos() * self.magnitudes).to(dtype), (angles.sin() * self.magnitudes).to(dtype))


class QueryScalingRope(Rope):
    """Behind the original context queries grow: by 1 + beta · log(1 + how many times the context fits before them)."""

    def __init__(self, config: RopeConfig, head_dim: int, beta: float, original_context: int) -> None:
        super().__init__(config, head_dim)
        self.beta, self.original_context = beta, original_context

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        scale = 1 + self.beta * torch.log1p((positions // self.original_context).float())
        return super().forward(positions, dtype)._replace(query_scale=scale[:, None, None].to(dtype))


class NoRope(nn.Module):
    """For families whose positions are not rotations."""

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Empty cosines and sines."""
        nothing = positions.new_empty((len(positions), 1, 0), dtype=dtype)
        return Rotary(nothing, nothing)


def magnitude(config: RopeConfig) -> float:
    """The factor of cosines and sines."""
    return config.scaling.magnitude if isinstance(config.scaling, YarnScaling | Divisors) else 1.0


def frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians a position for each pair of values, float32 [rotary_dim / 2]."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
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
        case YarnScaling():
            return yarn_frequencies(plain, config.theta, config.scaling)


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


def yarn_frequencies(plain: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """YaRN's scaling: pair i turns `context / (2 pi) · theta^(-i / num_pairs)` times in the original context.

    Solved for i, the two betas give the ends of the passage from kept to divided frequencies.
    """
    num_pairs = len(plain)

    def pair_of(turns: float) -> float:
        return num_pairs * math.log(scaling.original_context / (2 * math.pi * turns)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    pairs = torch.arange(num_pairs, dtype=torch.float32, device="cpu")
    divided = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - divided) * plain + divided * plain / scaling.factor


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns the pairs (i, i + dim / 2) of x [T, heads, dim] by each token's angles."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotary.cos, rotary.sin
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
