"""Blocks in other orders than the usual one (models/decoder.py): parallel branches, scaled branches, norms behind."""

from __future__ import annotations

from torch import nn

from tabstop.layers.attention import Attention
from tabstop.layers.norm import Norm, Residual
from tabstop.layers.rope import Rotary
from tabstop.models import StepContext
from tabstop.models.decoder import Block


class ParallelBlock(Block):
    """x + attention(norm(x)) + mlp(other norm(x))."""

    def forward(self, residual: Residual, rotary: Rotary, context: StepContext) -> Residual:
        normed, x = self.attention_norm.add(residual)
        return Residual(x, self.attention(normed, rotary, context) + self.mlp(self.mlp_norm(x)))


class SharedNormBlock(Block):
    """x + attention(y) + mlp(y) with y = norm(x)."""

    def __init__(self, norm: Norm, attention: Attention, mlp: nn.Module) -> None:
        super().__init__(norm, attention, norm, mlp)

    def forward(self, residual: Residual, rotary: Rotary, context: StepContext) -> Residual:
        normed, x = self.attention_norm.add(residual)
        return Residual(x, self.attention(normed, rotary, context) + self.mlp(normed))


class ScaledBlock(Block):
    """x + attention(norm(x)) · factor, then x + mlp(norm(x)) · factor."""

    def __init__(self, norms: tuple[Norm, Norm], attention: Attention, mlp: nn.Module, factor: float) -> None:
        """norms: before the attention, before the MLP."""
        super().__init__(norms[0], attention, norms[1], mlp)
        self.factor = factor

    def forward(self, residual: Residual, rotary: Rotary, context: StepContext) -> Residual:
        normed, x = self.attention_norm.add(residual)
        normed, x = self.mlp_norm.add(Residual(x, self.attention(normed, rotary, context) * self.factor))
        return Residual(x, self.mlp(normed) * self.factor)


class SandwichBlock(Block):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): four norms."""

    def __init__(self, norms: tuple[Norm, Norm, Norm, Norm], attention: Attention, mlp: nn.Module) -> None:
        """norms: before and behind the attention, before and behind the MLP."""
        super().__init__(norms[0], attention, norms[2], mlp)
        self.attention_out_norm, self.mlp_out_norm = norms[1], norms[3]

    def forward(self, residual: Residual, rotary: Rotary, context: StepContext) -> Residual:
        normed, x = self.attention_norm.add(residual)
        attended = self.attention_out_norm(self.attention(normed, rotary, context))
        normed, x = self.mlp_norm.add(Residual(x, attended))
        return Residual(x, self.mlp_out_norm(self.mlp(normed)))
