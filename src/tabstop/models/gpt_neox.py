"""GPT-NeoX (PolyCoder, Pythia): branches side by side with a norm each, q, k and v packed head by head."""

from __future__ import annotations

from torch import nn

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import Embedding, Head, Linear, Part, TiedHead
from tabstop.layers.mlp import PlainMLP, activation
from tabstop.layers.norm import LayerNorm
from tabstop.layers.projections import head_by_head
from tabstop.layers.rope import Rope
from tabstop.models.blocks import ParallelBlock
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config

IGNORED = {
    r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias": "the causal mask",
    r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "computed from the config",
}


def gpt_neox(config: ModelConfig, shard: Shard) -> Decoder:
    hidden, inner = config.hidden_size, config.intermediate_size
    act, bias = activation(str(config.values.values["hidden_act"])), config.values.boolean("attention_bias", True)
    packed = head_by_head("query_key_value")
    attention = attention_config(config, qkv_bias=bias, out_bias=bias, projections=packed, out_name="dense")
    kind = ParallelBlock if config.values.boolean("use_parallel_residual", True) else Block

    def norm(name: str) -> LayerNorm:
        return LayerNorm(f"gpt_neox.{name}", hidden, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"gpt_neox.layers.{index}"
        return kind(
            norm(f"layers.{index}.input_layernorm"),
            Attention(f"{prefix}.attention", index, attention, shard),
            norm(f"layers.{index}.post_attention_layernorm"),
            PlainMLP(
                Linear(f"{prefix}.mlp", hidden, [Part("dense_h_to_4h", inner)], bias=True, split=shard.rows),
                Linear(f"{prefix}.mlp", inner, [Part("dense_4h_to_h", hidden)], bias=True, split=shard.columns),
                act,
            ),
        )

    embedding = Embedding("gpt_neox.embed_in", config.vocab_size, hidden)
    head: nn.Module = TiedHead(embedding)
    if not config.tied_head:
        head = Head("", hidden, [Part("embed_out", config.vocab_size)])
    blocks = [block(index) for index in range(config.num_layers)]
    decoder = Decoder(embedding, Rope(config.rope, config.head_dim), blocks, norm("final_layer_norm"), head)
    decoder.ignored = IGNORED | ({r"embed_out\.weight": "a copy of the embedding"} if config.tied_head else {})
    return decoder
