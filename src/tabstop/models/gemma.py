"""Gemma (CodeGemma): large heads, norms of 1 + weight, scaled embeddings, gated GELU."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import ScaledEmbedding
from tabstop.layers.mlp import GeluGatedMLP
from tabstop.layers.norm import OffsetRMSNorm
from tabstop.layers.rope import Rope
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import IGNORED, IGNORED_WHEN_TIED, attention_config, output_head


def gemma(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("hidden_act", None, "gelu", "gelu_pytorch_tanh")  # both mean the tanh formula here
    config.values.require("use_bidirectional_attention", None, False)
    bias = config.values.boolean("attention_bias", False)
    attention = attention_config(config, qkv_bias=bias, out_bias=bias)

    def norm(name: str) -> OffsetRMSNorm:
        return OffsetRMSNorm(name, config.hidden_size, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            norm(f"{prefix}.input_layernorm"),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            norm(f"{prefix}.post_attention_layernorm"),
            GeluGatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    factor = config.hidden_size**0.5
    embedding = ScaledEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, factor)
    blocks = [block(index) for index in range(config.num_layers)]
    rope = Rope(config.rope, config.head_dim)
    decoder = Decoder(embedding, rope, blocks, norm("model.norm"), output_head(config, embedding))
    decoder.ignored = IGNORED | (IGNORED_WHEN_TIED if config.tied_head else {})
    return decoder
