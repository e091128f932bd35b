"""Granite 3.x: Llama with multipliers for embeddings, attention scores, branches and logits."""

from __future__ import annotations

import torch
from torch import nn

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import ScaledEmbedding
from tabstop.layers.mlp import GatedMLP
from tabstop.layers.rope import Rope
from tabstop.models.blocks import ScaledBlock
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import IGNORED, IGNORED_WHEN_TIED, attention_config, output_head, rms_norm


class DividedHead(nn.Module):
    """A head whose logits are divided by a number."""

    def __init__(self, head: nn.Module, divisor: float) -> None:
        super().__init__()
        self.head, self.divisor = head, divisor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] → [R, vocab_size]."""
        result: torch.Tensor = self.head(hidden) / self.divisor
        return result


def granite(config: ModelConfig, shard: Shard) -> Decoder:
    values = config.values
    values.require("hidden_act", None, "silu")
    attention_bias, mlp_bias = values.boolean("attention_bias", False), values.boolean("mlp_bias", False)
    scale, factor = values.number("attention_multiplier", 1.0), values.number("residual_multiplier", 1.0)
    attention = attention_config(config, qkv_bias=attention_bias, out_bias=attention_bias, scale=scale)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return ScaledBlock(
            (rms_norm(config, f"{prefix}.input_layernorm"), rms_norm(config, f"{prefix}.post_attention_layernorm")),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, bias=mlp_bias, shard=shard),
            factor,
        )

    multiplier = values.number("embedding_multiplier", 1.0)
    embedding = ScaledEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, multiplier)
    decoder = Decoder(
        embedding,
        Rope(config.rope, config.head_dim),
        [block(index) for index in range(config.num_layers)],
        rms_norm(config, "model.norm"),
        DividedHead(output_head(config, embedding), values.number("logits_scaling", 1.0)),
    )
    decoder.ignored = IGNORED | (IGNORED_WHEN_TIED if config.tied_head else {})
    return decoder
