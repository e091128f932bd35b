"""Multi-head attention with grouped key and value heads: projections and rotation; the rest is the backend's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tabstop.cache import CacheKind, CacheSpec
from tabstop.errors import UnsupportedModelError
from tabstop.layers import SINGLE, Shard
from tabstop.layers.linear import Linear, Part
from tabstop.layers.rope import Rotary, rotate
from tabstop.models import StepContext


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The layer's dimensions over all ranks, and which projections have biases."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False


class Attention(nn.Module):
    """qkv → rotate q and k → attend over the layer's cache → out.

    prefix: checkpoint path of the projections · index: the layer's number, which is its place in StepContext.kv.
    """

    def __init__(self, prefix: str, index: int, config: AttentionConfig, shard: Shard = SINGLE) -> None:
        super().__init__()
        if config.num_heads % shard.size:
            raise UnsupportedModelError(f"{config.num_heads} heads cannot be divided among {shard.size} ranks")
        hidden, dim = config.hidden_size, config.head_dim
        query_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
        parts = [Part("q_proj", query_rows, dim), Part("k_proj", kv_rows, dim), Part("v_proj", kv_rows, dim)]
        self.qkv = Linear(prefix, hidden, parts, bias=config.qkv_bias, split=shard.rows)
        self.out = Linear(prefix, query_rows, [Part("o_proj", hidden)], bias=config.out_bias, split=shard.columns)
        self.num_heads, self.num_kv_heads = (part.num_rows // dim for part in self.qkv.parts[:2])  # of this rank
        self.head_dim = dim
        self.index = index
        self.scale = dim**-0.5

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec(CacheKind.PAGED, self.num_kv_heads, self.head_dim)

    def forward(self, x: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]."""
        qkv = self.qkv(x).view(len(x), -1, self.head_dim)
        num_turned = self.num_heads + self.num_kv_heads
        turned = rotate(qkv[:, :num_turned], rotary)
        q, k, v = turned[:, : self.num_heads], turned[:, self.num_heads :], qkv[:, num_turned:]
        attended = context.attention.run(q, k, v, context.kv[self.index], context.meta, self.scale, None)
        result: torch.Tensor = self.out(attended.reshape(len(x), -1))
        return result
