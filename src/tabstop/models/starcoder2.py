"""Starcoder2: LayerNorm, biases, a plain MLP, and a window over the last positions."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import Linear, Part
from tabstop.layers.mlp import PlainMLP, activation
from tabstop.layers.norm import LayerNorm
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config, framed
from tabstop.models.mistral import sliding_window


def starcoder2(config: ModelConfig, shard: Shard) -> Decoder:
    bias = config.values.boolean("use_bias", True)
    act = activation(str(config.values.values["hidden_act"]))
    attention = attention_config(config, qkv_bias=bias, out_bias=bias, window=sliding_window(config.values))

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        up, down = [Part("c_fc", config.intermediate_size)], [Part("c_proj", config.hidden_size)]
        return Block(
            LayerNorm(f"{prefix}.input_layernorm", config.hidden_size, config.norm_eps),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            LayerNorm(f"{prefix}.post_attention_layernorm", config.hidden_size, config.norm_eps),
            PlainMLP(
                Linear(f"{prefix}.mlp", config.hidden_size, up, bias=bias, split=shard.rows),
                Linear(f"{prefix}.mlp", config.intermediate_size, down, bias=bias, split=shard.columns),
                act,
            ),
        )

    norm = LayerNorm("model.norm", config.hidden_size, config.norm_eps)
    return framed(config, [block(index) for index in range(config.num_layers)], norm)
