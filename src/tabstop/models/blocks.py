"""Blocks in other orders than the usual one (models/decoder.py): parallel branches, scaled branches, norms behind."""

from __future__ import annotations

import torch
from torch import nn

from tabstop.layers.attention import Attention
from tabstop.layers.rope import Rotary
from tabstop.models import StepContext
from tabstop.models.decoder import Block


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(other norm(x))."""

    def forward(self, x: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x), rotary, context)
        result: torch.Tensor = x + attended + self.mlp(self.mlp_norm(x))
        return result


class SharedNormBlock(Block):
    """x + attention(y) + mlp(y) with y = norm(x)."""

    def __init__(self, norm: nn.Module, attention: Attention, mlp: nn.Module) -> None:
        super().__init__(norm, attention, nn.Identity(), mlp)

    def forward(self, x: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        normed = self.attention_norm(x)
        result: torch.Tensor = x + self.attention(normed, rotary, context) + self.mlp(normed)
        return result


class ScaledBlock(Block):
    """x + attention(norm(x)) · factor, then x + mlp(norm(x)) · factor."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: Attention, mlp: nn.Module, factor: float) -> None:
        """norms: before the attention, before the MLP."""
        super().__init__(norms[0], attention, norms[1], mlp)
        self.factor = factor

    def forward(self, x: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, context) * self.factor
        result: torch.Tensor = x + self.mlp(self.mlp_norm(x)) * self.factor
        return result


class SandwichBlock(Block):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): four norms."""

    def __init__(
        self, norms: tuple[nn.Module, nn.Module, nn.Module, nn.Module], attention: Attention, mlp: nn.Module
    ) -> None:
        """norms: before and behind the attention, before and behind the MLP."""
        super().__init__(norms[0], attention, norms[2], mlp)
        self.attention_out_norm, self.mlp_out_norm = norms[1], norms[3]

    def forward(self, x: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), rotary, context))
        result: torch.Tensor = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        return result
