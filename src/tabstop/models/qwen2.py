"""Qwen2 and Qwen2.5 (Coder): Llama with biases on q, k and v."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Decoder
from tabstop.models.llama import attention_config, llama_like


def qwen2(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("use_sliding_window", None, False)
    return llama_like(config, shard, attention_config(config, qkv_bias=True), mlp_bias=False)
