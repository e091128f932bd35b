"""Feed-forward layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tabstop.layers import SINGLE, Shard
from tabstop.layers.linear import Linear, Part


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up as one matrix."""

    def __init__(self, prefix: str, hidden_size: int, size: int, *, bias: bool = False, shard: Shard = SINGLE) -> None:
        super().__init__()
        parts = [Part("gate_proj", size), Part("up_proj", size)]
        self.gate_up = Linear(prefix, hidden_size, parts, bias=bias, split=shard.rows)
        self.down = Linear(prefix, size, [Part("down_proj", hidden_size)], bias=bias, split=shard.columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        result: torch.Tensor = self.down(functional.silu(gate) * up)
        return result
