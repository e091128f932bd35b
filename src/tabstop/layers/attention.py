"""Multi-head attention with grouped key and value heads: projections and rotation; the rest is the backend's.

Variants differ in how q and k are prepared (`turn`); where the checkpoint keeps their rows is layers/projections.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tabstop.attention import FusedBackend
from tabstop.cache import CacheKind, CacheSpec
from tabstop.errors import UnsupportedModelError
from tabstop.layers import SINGLE, Shard
from tabstop.layers.linear import Linear, Part
from tabstop.layers.norm import RMSNorm
from tabstop.layers.projections import Heads, Projections, rotary_order, separate
from tabstop.layers.rope import Rotary, rotate
from tabstop.models import StepContext


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The layer's dimensions over all ranks, and where its projections lie."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None  # positions that a token sees, its own included; None: all
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    rotary_dim: int | None = None  # values of each head that positions turn; None: all
    interleaved: bool = False  # whether the checkpoint pairs neighbours for rotation, not halves
    projections: Projections = separate
    out_name: str = "o_proj"

    @property
    def heads(self) -> Heads:
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        order = rotary_order(self.head_dim, rotary_dim, self.interleaved)
        return Heads(self.num_heads, self.num_kv_heads, self.head_dim, order)


class Attention(nn.Module):
    """qkv → rotate q and k → attend over the layer's cache → out.

    prefix: checkpoint path of the projections · index: the layer's number, which is its place in StepContext.kv.
    """

    turns_plainly = True  # `turn` is the rotation and nothing else, so a backend may do it

    def __init__(self, prefix: str, index: int, config: AttentionConfig, shard: Shard = SINGLE) -> None:
        super().__init__()
        if config.num_heads % shard.size:
            raise UnsupportedModelError(f"{config.num_heads} heads cannot be divided among {shard.size} ranks")
        hidden, dim = config.hidden_size, config.head_dim
        parts, out = config.projections(config.heads), [Part(config.out_name, hidden)]
        self.qkv = Linear(prefix, hidden, parts, bias=config.qkv_bias, split=shard.rows)
        self.out = Linear(prefix, config.num_heads * dim, out, bias=config.out_bias, split=shard.columns)
        self.num_heads, self.num_kv_heads = (part.num_rows // dim for part in self.qkv.parts[:2])  # of this rank
        self.head_dim = dim
        self.index = index
        self.scale = dim**-0.5 if config.scale is None else config.scale
        self.window = config.window

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec(CacheKind.PAGED, self.num_kv_heads, self.head_dim, self.window)

    def turn(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """q and k heads [T, num_heads + num_kv_heads, dim] as they are compared with each other."""
        return rotate(heads, rotary)

    def forward(self, x: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]."""
        attended = self.attend(self.qkv(x), rotary, context)
        result: torch.Tensor = self.out(attended.reshape(len(x), -1))
        return result

    def attend(self, qkv: torch.Tensor, rotary: Rotary, context: StepContext) -> torch.Tensor:
        """qkv [T, (heads + 2 * KV heads) * dim] → [T, heads, dim]; a backend that can turns and stores at once."""
        backend, kv, meta = context.attention, context.kv[self.index], context.meta
        if self.turns_plainly and isinstance(backend, FusedBackend):
            q = backend.rotate_and_store(qkv, rotary.cos, rotary.sin, kv, meta)
            return backend.attend(q, kv, meta, self.scale, self.window)
        heads = qkv.view(len(qkv), -1, self.head_dim)
        num_turned = self.num_heads + self.num_kv_heads
        turned = self.turn(heads[:, :num_turned], rotary)
        q, k, v = turned[:, : self.num_heads], turned[:, self.num_heads :], heads[:, num_turned:]
        return backend.run(q, k, v, kv, meta, self.scale, self.window)


class UnturnedAttention(Attention):
    """Positions are not the attention's business: they were added to the embedding."""

    turns_plainly = False

    def turn(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        return heads


class NormedAttention(Attention):
    """Each q head and each k head is normed before it is turned; all q heads share weights, all k heads others."""

    turns_plainly = False

    def __init__(
        self, prefix: str, index: int, config: AttentionConfig, shard: Shard = SINGLE, *, eps: float = 1e-6
    ) -> None:
        super().__init__(prefix, index, config, shard)
        assert config.heads.order is None, "the norms' weights would need the order of the rows"
        self.q_norm = RMSNorm(f"{prefix}.q_norm", config.head_dim, eps)
        self.k_norm = RMSNorm(f"{prefix}.k_norm", config.head_dim, eps)

    def turn(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        q, k = heads[:, : self.num_heads], heads[:, self.num_heads :]
        return rotate(torch.cat((self.q_norm(q), self.k_norm(k)), dim=1), rotary)


class QueryScalingAttention(Attention):
    """Queries are multiplied by a number that depends on their position (layers/rope.py)."""

    turns_plainly = False

    def turn(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        assert rotary.query_scale is not None
        turned = rotate(heads, rotary)
        return torch.cat((turned[:, : self.num_heads] * rotary.query_scale, turned[:, self.num_heads :]), dim=1)
