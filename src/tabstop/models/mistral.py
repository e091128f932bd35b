"""Mistral, Codestral, Devstral, Ministral: Llama with a window over the last positions, in all layers or in some.

From Ministral 3 on (Devstral 2), queries grow with their position instead.
"""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention, QueryScalingAttention
from tabstop.layers.mlp import GatedMLP
from tabstop.layers.rope import QueryScalingRope
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config, framed, llama_like, rms_norm
from tabstop.models.values import ConfigValues

LAYER_TYPES = ("full_attention", "sliding_attention")


def mistral(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("layer_types", None)
    return llama_like(config, shard, attention_config(config, window=sliding_window(config.values)), mlp_bias=False)


def ministral(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("hidden_act", None, "silu")
    windows = layer_windows(config)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        attention = attention_config(config, window=windows[index])
        return Block(
            rms_norm(config, f"{prefix}.input_layernorm"),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            rms_norm(config, f"{prefix}.post_attention_layernorm"),
            GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    return framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))


def ministral3(config: ModelConfig, shard: Shard) -> Decoder:
    values = config.values
    values.require("hidden_act", None, "silu")
    nested = values.values.get("rope_parameters") or values.values.get("rope_scaling") or {}
    scaling = ConfigValues(nested, f"{values.origin}, rope_parameters")
    beta, context = scaling.number("llama_4_scaling_beta"), scaling.integer("original_max_position_embeddings")
    attention = attention_config(config, window=sliding_window(values))

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return Block(
            rms_norm(config, f"{prefix}.input_layernorm"),
            QueryScalingAttention(f"{prefix}.self_attn", index, attention, shard),
            rms_norm(config, f"{prefix}.post_attention_layernorm"),
            GatedMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard=shard),
        )

    decoder = framed(config, [block(index) for index in range(config.num_layers)], rms_norm(config, "model.norm"))
    decoder.rope = QueryScalingRope(config.rope, config.head_dim, beta, context)
    return decoder


def sliding_window(values: ConfigValues) -> int | None:
    """Positions that a token sees, its own included; None: all."""
    return None if values.values.get("sliding_window") is None else values.integer("sliding_window")


def layer_windows(config: ModelConfig) -> list[int | None]:
    """Each layer's window. Raises UnsupportedModelError for a list of layer types that does not fit."""
    window = sliding_window(config.values)
    types = config.values.values.get("layer_types")
    if types is None:
        return [window] * config.num_layers
    if not isinstance(types, list) or len(types) != config.num_layers or not set(types) <= set(LAYER_TYPES):
        raise config.values.refuse("layer_types", f"{config.num_layers} of {', '.join(LAYER_TYPES)}")
    return [window if kind == "sliding_attention" else None for kind in types]
