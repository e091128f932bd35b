"""Normalisation layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from tabstop.kernels.norm import add_rms_norm, rms_norm
from tabstop.quant import Loading, QuantScheme, TensorRead


class Residual(NamedTuple):
    """The residual stream, with a layer's output that is still to be added: the next norm does both in one kernel."""

    x: torch.Tensor  # [T, hidden]
    branch: torch.Tensor | None = None


class Norm(nn.Module):
    """What all norms share: the residual stream passes through them."""

    def add(self, residual: Residual) -> tuple[torch.Tensor, torch.Tensor]:
        """(the norm of the sum, the sum)."""
        x = residual.x if residual.branch is None else residual.x + residual.branch
        return self(x), x


class RMSNorm(Norm):
    """x / rms(x) · weight over the last axis; the mean square is taken in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.read = TensorRead(f"{name}.weight", (size,), (slice(0, size),))
        self.eps = eps
        self.weight: torch.Tensor | None = None

    def reads(self, scheme: QuantScheme) -> list[TensorRead]:
        return [self.read]

    def load(self, loading: Loading) -> None:
        weight = loading.vector(self.read)
        self.weight = weight.float() if weight.device.type == "cpu" else weight  # a CPU multiplies in float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] → the same shape and type."""
        assert self.weight is not None, "not loaded"
        return rms_norm(x, self.weight, self.eps)

    def add(self, residual: Residual) -> tuple[torch.Tensor, torch.Tensor]:
        if residual.branch is None:
            return self(residual.x), residual.x
        assert self.weight is not None, "not loaded"
        return add_rms_norm(residual.branch, residual.x, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """As RMSNorm, with 1 + weight for the weight; the product is float32, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight is not None, "not loaded"
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)

    def add(self, residual: Residual) -> tuple[torch.Tensor, torch.Tensor]:
        return Norm.add(self, residual)


class LayerNorm(Norm):
    """(x - mean) / standard deviation · weight + bias over the last axis (Ba et al., 2016)."""

    def __init__(self, name: str, size: int, eps: float) -> None:
        super().__init__()
        self.names = [TensorRead(f"{name}.{kind}", (size,), (slice(0, size),)) for kind in ("weight", "bias")]
        self.size, self.eps = size, eps
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def reads(self, scheme: QuantScheme) -> list[TensorRead]:
        return self.names

    def load(self, loading: Loading) -> None:
        self.weight, self.bias = (loading.vector(read) for read in self.names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] → the same shape and type."""
        assert self.weight is not None, "not loaded"
        return functional.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
