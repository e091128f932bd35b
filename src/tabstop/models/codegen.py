"""CodeGen: GPT-J's block (branches side by side, neighbours turned), q, v and k packed in four groups of heads."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import Embedding, Head, Linear, Part
from tabstop.layers.mlp import PlainMLP, activation
from tabstop.layers.norm import LayerNorm
from tabstop.layers.projections import grouped
from tabstop.layers.rope import Rope
from tabstop.models.blocks import SharedNormBlock
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config

NUM_GROUPS = 4
"""Of heads in qkv_proj: the model was trained on as many processors."""

IGNORED = {r"transformer\.h\.\d+\.attn\.(causal_mask|bias|masked_bias)": "the causal mask"}


def codegen(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("tie_word_embeddings", None, False)  # its head has a bias
    hidden, inner, act = (
        config.hidden_size,
        config.intermediate_size,
        activation(str(config.values.values["hidden_act"])),
    )
    packed = grouped("qkv_proj", NUM_GROUPS)
    attention = attention_config(config, interleaved=True, projections=packed, out_name="out_proj")

    def norm(name: str) -> LayerNorm:
        return LayerNorm(f"transformer.{name}", hidden, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        return SharedNormBlock(
            norm(f"h.{index}.ln_1"),
            Attention(f"{prefix}.attn", index, attention, shard),
            PlainMLP(
                Linear(f"{prefix}.mlp", hidden, [Part("fc_in", inner)], bias=True, split=shard.rows),
                Linear(f"{prefix}.mlp", inner, [Part("fc_out", hidden)], bias=True, split=shard.columns),
                act,
            ),
        )

    decoder = Decoder(
        Embedding("transformer.wte", config.vocab_size, hidden),
        Rope(config.rope, config.head_dim),
        [block(index) for index in range(config.num_layers)],
        norm("ln_f"),
        Head("", hidden, [Part("lm_head", config.vocab_size)], bias=True),
    )
    decoder.ignored = IGNORED
    return decoder
