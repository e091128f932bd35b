"""GLM-4: neighbouring values of half of each head are turned, gate and up are one matrix; from 0414 on four norms."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention, AttentionConfig
from tabstop.layers.mlp import StackedGatedMLP
from tabstop.models.blocks import SandwichBlock
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config, framed, rms_norm


def glm(config: ModelConfig, shard: Shard) -> Decoder:
    attention = _attention(config)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            rms_norm(config, f"{prefix}.input_layernorm"),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            rms_norm(config, f"{prefix}.post_attention_layernorm"),
            StackedGatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    return framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))


def glm4(config: ModelConfig, shard: Shard) -> Decoder:
    attention = _attention(config)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return SandwichBlock(
            (
                rms_norm(config, f"{prefix}.input_layernorm"),
                rms_norm(config, f"{prefix}.post_self_attn_layernorm"),
                rms_norm(config, f"{prefix}.post_attention_layernorm"),
                rms_norm(config, f"{prefix}.post_mlp_layernorm"),
            ),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            StackedGatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    return framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))


def _attention(config: ModelConfig) -> AttentionConfig:
    config.values.require("hidden_act", None, "silu")
    return attention_config(config, qkv_bias=config.values.boolean("attention_bias", True), interleaved=True)
