"""Qwen3: Llama whose q and k heads are normed."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import NormedAttention
from tabstop.layers.mlp import GatedMLP
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config, framed, rms_norm


def qwen3(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("use_sliding_window", None, False)
    config.values.require("hidden_act", None, "silu")
    bias = config.values.boolean("attention_bias", False)
    attention = attention_config(config, qkv_bias=bias, out_bias=bias)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            rms_norm(config, f"{prefix}.input_layernorm"),
            NormedAttention(f"{prefix}.self_attn", index, attention, shard, eps=config.norm_eps),
            rms_norm(config, f"{prefix}.post_attention_layernorm"),
            GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    return framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))
