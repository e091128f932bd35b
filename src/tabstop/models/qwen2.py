"""Qwen2 and Qwen2.5 (Coder): Llama with biases on q, k and v."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import AttentionConfig
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Decoder
from tabstop.models.llama import llama_like


def qwen2(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("use_sliding_window", None, False)
    attention = AttentionConfig(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, qkv_bias=True
    )
    return llama_like(config, shard, attention, mlp_bias=False)
