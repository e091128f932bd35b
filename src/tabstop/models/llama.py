"""Llama: RMS norms, rotary attention with grouped heads, gated SiLU; also the frame of what differs in biases only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tabstop.layers import Shard
from tabstop.layers.attention import Attention, AttentionConfig
from tabstop.layers.linear import Embedding, Head, Part, TiedHead
from tabstop.layers.mlp import GatedMLP
from tabstop.layers.norm import Norm, RMSNorm
from tabstop.layers.rope import Rope
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder

IGNORED = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from the config",
    r"rope_freqs\.weight": "part of the config (GGUF)",
    r"rope_factors_(long|short)\.weight": "part of the config (GGUF)",
}
IGNORED_WHEN_TIED = {r"lm_head\.weight": "a copy of the embedding"}


def llama(config: ModelConfig, shard: Shard) -> Decoder:
    bias = config.values.boolean("attention_bias", False)
    attention = attention_config(config, qkv_bias=bias, out_bias=bias)
    return llama_like(config, shard, attention, mlp_bias=config.values.boolean("mlp_bias", False))


def attention_config(config: ModelConfig, **more: Any) -> AttentionConfig:
    """The dimensions that the config names; `more` are other fields of AttentionConfig."""
    return AttentionConfig(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        rotary_dim=config.rope.rotary_dim,
        **more,
    )


def llama_like(config: ModelConfig, shard: Shard, attention: AttentionConfig, mlp_bias: bool) -> Decoder:
    """The frame. A family that needs another keyword here should have its own file instead."""
    config.values.require("hidden_act", None, "silu")

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            rms_norm(config, f"{prefix}.input_layernorm"),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            rms_norm(config, f"{prefix}.post_attention_layernorm"),
            GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, bias=mlp_bias, shard=shard),
        )

    return framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))


def rms_norm(config: ModelConfig, name: str) -> RMSNorm:
    return RMSNorm(name, config.hidden_size, config.norm_eps)


def framed(config: ModelConfig, blocks: Sequence[Block], norm: Norm) -> Decoder:
    """Blocks between an embedding, rotary positions and a head under Llama's names."""
    embedding = Embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
    decoder = Decoder(embedding, Rope(config.rope, config.head_dim), blocks, norm, output_head(config, embedding))
    decoder.ignored = IGNORED | (IGNORED_WHEN_TIED if config.tied_head else {})
    return decoder


def output_head(config: ModelConfig, embedding: Embedding) -> nn.Module:
    """The embedding's own matrix, or one named lm_head."""
    if config.tied_head:
        return TiedHead(embedding)
    return Head("", config.hidden_size, [Part("lm_head", config.vocab_size)])
