"""Phi-1, 1.5 and 2: attention and MLP side by side behind one LayerNorm, a part of each head turned, biases."""

from __future__ import annotations

from torch import nn

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import Embedding, Head, Linear, Part
from tabstop.layers.mlp import PlainMLP, activation
from tabstop.layers.norm import LayerNorm
from tabstop.layers.rope import Rope
from tabstop.models.blocks import SharedNormBlock
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import IGNORED, attention_config


def phi(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("qk_layernorm", None, False)
    config.values.require("tie_word_embeddings", None, False)  # its head has a bias
    act, hidden, inner = (
        activation(str(config.values.values["hidden_act"])),
        config.hidden_size,
        config.intermediate_size,
    )
    attention = attention_config(config, qkv_bias=True, out_bias=True, out_name="dense")

    def norm(name: str) -> LayerNorm:
        return LayerNorm(f"model.{name}", hidden, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"model.layers.{index}"
        return SharedNormBlock(
            norm(f"layers.{index}.input_layernorm"),
            Attention(f"{prefix}.self_attn", index, attention, shard),
            PlainMLP(
                Linear(f"{prefix}.mlp", hidden, [Part("fc1", inner)], bias=True, split=shard.rows),
                Linear(f"{prefix}.mlp", inner, [Part("fc2", hidden)], bias=True, split=shard.columns),
                act,
            ),
        )

    embedding = Embedding("model.embed_tokens", config.vocab_size, hidden)
    head: nn.Module = Head("", hidden, [Part("lm_head", config.vocab_size)], bias=True)
    blocks = [block(index) for index in range(config.num_layers)]
    decoder = Decoder(embedding, Rope(config.rope, config.head_dim), blocks, norm("final_layernorm"), head)
    decoder.ignored = IGNORED
    return decoder
