"""Phi-3, 3.5 and 4: Llama whose q, k, v and whose gate and up are one matrix each; longrope, sometimes a window."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.mlp import StackedGatedMLP
from tabstop.layers.projections import stacked
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config, framed, rms_norm
from tabstop.models.mistral import sliding_window


def phi3(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("hidden_act", None, "silu")
    config.values.require("attention_bias", None, False)
    window = sliding_window(config.values)
    attention = attention_config(config, window=window, projections=stacked("qkv_proj"))

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            rms_norm(config, f"{prefix}.input_layernorm"),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            rms_norm(config, f"{prefix}.post_attention_layernorm"),
            StackedGatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    return framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))
