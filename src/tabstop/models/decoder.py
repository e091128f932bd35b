"""The skeleton of a pre-norm decoder: embedding, blocks, norm, head. Families compose its parts; it asks no questions.

Knows nothing of checkpoints' formats, of sampling or of which rows belong to which request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tabstop.cache import CacheSpec
from tabstop.layers.attention import Attention
from tabstop.layers.linear import Embedding
from tabstop.layers.norm import Norm, Residual
from tabstop.layers.rope import Rotary
from tabstop.models import StepContext


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, residual: Residual, rotary: Rotary, context: StepContext) -> Residual:
        normed, x = self.attention_norm.add(residual)
        normed, x = self.mlp_norm.add(Residual(x, self.attention(normed, rotary, context)))
        return Residual(x, self.mlp(normed))


class Decoder(nn.Module):
    """A whole model; satisfies models.Model once loaded.

    The family fills `ignored`: checkpoint tensors that are rightly not read, as regular expression → reason. The loader
    fills `weight_bytes` and `weights`.
    """

    def __init__(
        self, embedding: Embedding, rope: nn.Module, blocks: Sequence[Block], norm: Norm, head: nn.Module
    ) -> None:
        super().__init__()
        self.embedding, self.rope, self.norm, self.head = embedding, rope, norm, head
        self.blocks = nn.ModuleList(blocks)
        self.vocab_size = embedding.part.shape[0]
        self.num_heads = blocks[0].attention.num_heads  # of this rank
        self.cache_specs: list[CacheSpec] = [block.attention.cache_spec for block in blocks]
        self.ignored: Mapping[str, str] = {}
        self.weight_bytes = 0
        self.weights = ""  # how they are held, for people

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint tensor is rightly not read."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, context: StepContext) -> torch.Tensor:
        """ids, positions int64 [T] → final hidden states [T, hidden], normed."""
        residual = Residual(self.embed(ids, positions))
        rotary = self.rope(positions, residual.x.dtype)
        for block in self.blocks:
            residual = block(residual, rotary, context)
        return self.norm.add(residual)[0]

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """ids, positions int64 [T] → what the first block gets, [T, hidden]."""
        vectors: torch.Tensor = self.embedding(ids)
        return vectors

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] → float32 [R, vocab_size]."""
        scores: torch.Tensor = self.head(hidden)
        return scores
