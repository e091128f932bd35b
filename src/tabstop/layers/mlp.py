"""Feed-forward layers, gated and plain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tabstop.errors import UnsupportedModelError
from tabstop.layers import SINGLE, Shard
from tabstop.layers.linear import Linear, Part
from tabstop.quant import Placement

Activation = Callable[[torch.Tensor], torch.Tensor]

_gelu_tanh: Activation = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
}
"""The Hub's name → function. Three names are one function, written in three ways."""


def activation(name: str) -> Activation:
    """Raises UnsupportedModelError for a name that is not known."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"the activation is {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up as one matrix."""

    def __init__(self, prefix: str, hidden_size: int, size: int, *, bias: bool = False, shard: Shard = SINGLE) -> None:
        super().__init__()
        self.gate_up = Linear(prefix, hidden_size, self.gate_and_up(size), bias=bias, split=shard.rows)
        self.down = Linear(prefix, size, [Part("down_proj", hidden_size)], bias=bias, split=shard.columns)

    def gate_and_up(self, size: int) -> list[Part]:
        """Where the checkpoint keeps them."""
        return [Part("gate_proj", size), Part("up_proj", size)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]."""
        result: torch.Tensor = self.down(self.gated(x))
        return result

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] → [T, size]."""
        return self.gate_up.gated(x)


class StackedGatedMLP(GatedMLP):
    """The checkpoint keeps gate and up in one matrix, gate first."""

    def gate_and_up(self, size: int) -> list[Part]:
        return [Part("gate_up_proj", size, placement=Placement(2 * size, size, (start,))) for start in (0, size)]


class GeluGatedMLP(GatedMLP):
    """down(gelu(gate(x)) · up(x)), by the tanh formula."""

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        result: torch.Tensor = _gelu_tanh(gate) * up
        return result


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, up: Linear, down: Linear, act: Activation) -> None:
        super().__init__()
        self.up, self.down, self.act = up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]."""
        result: torch.Tensor = self.down(self.act(self.up(x)))
        return result
