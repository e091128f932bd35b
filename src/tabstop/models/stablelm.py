"""StableLm (Stable Code): Llama with LayerNorm and heads of which a part is turned; sometimes branches side by side."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.mlp import GatedMLP
from tabstop.layers.norm import LayerNorm
from tabstop.models.blocks import SharedNormBlock
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config, framed


def stablelm(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("hidden_act", None, "silu")
    config.values.require("qk_layernorm", None, False)
    attention = attention_config(config, qkv_bias=config.values.boolean("use_qkv_bias", False))
    is_parallel = config.values.boolean("use_parallel_residual", False)

    def norm(name: str) -> LayerNorm:
        return LayerNorm(f"model.{name}", config.hidden_size, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        first = norm(f"layers.{index}.input_layernorm")
        attended = Attention(f"{prefix}.self_attn", index, attention, shard)
        mlp = GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard)
        if is_parallel:
            return SharedNormBlock(first, attended, mlp)
        return Block(first, attended, norm(f"layers.{index}.post_attention_layernorm"), mlp)

    return framed(config, [block(index) for index in range(config.num_layers)], norm("norm"))
