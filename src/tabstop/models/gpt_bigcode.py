"""GPTBigCode (SantaCoder, StarCoder, Granite 20B and 34B): GPT-2 with one key head; positions are learned and end."""

from __future__ import annotations

import torch

from tabstop.layers import Shard
from tabstop.layers.attention import AttentionConfig, UnturnedAttention
from tabstop.layers.linear import Embedding, Linear, Part
from tabstop.layers.mlp import PlainMLP, activation
from tabstop.layers.norm import LayerNorm
from tabstop.layers.projections import head_by_head, stacked
from tabstop.layers.rope import NoRope
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import IGNORED_WHEN_TIED, output_head

IGNORED = {r"transformer\.h\.\d+\.attn\.(masked_)?bias": "the causal mask"}


class LearnedPositionsDecoder(Decoder):
    """The embedding of a token's position is added to its own. The family fills `positions`.

    Positions behind the table belong to tokens that nobody will see (a finished row's surplus, a measured step).
    """

    positions: Embedding

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        last = self.positions.part.shape[0] - 1
        vectors: torch.Tensor = self.embedding(ids) + self.positions(positions.clamp(max=last))
        return vectors


def gpt_bigcode(config: ModelConfig, shard: Shard) -> Decoder:
    config.values.require("scale_attn_weights", None, True)
    config.values.require("add_cross_attention", None, False)
    act, hidden = activation(str(config.values.values["hidden_act"])), config.hidden_size
    attention = _attention(config)

    def norm(name: str) -> LayerNorm:
        return LayerNorm(f"transformer.{name}", hidden, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"transformer.h.{index}"
        up, down = [Part("c_fc", config.intermediate_size)], [Part("c_proj", hidden)]
        return Block(
            norm(f"h.{index}.ln_1"),
            UnturnedAttention(f"{prefix}.attn", index, attention, shard),
            norm(f"h.{index}.ln_2"),
            PlainMLP(
                Linear(f"{prefix}.mlp", hidden, up, bias=True, split=shard.rows),
                Linear(f"{prefix}.mlp", config.intermediate_size, down, bias=True, split=shard.columns),
                act,
            ),
        )

    embedding = Embedding("transformer.wte", config.vocab_size, hidden)
    blocks = [block(index) for index in range(config.num_layers)]
    decoder = LearnedPositionsDecoder(embedding, NoRope(), blocks, norm("ln_f"), output_head(config, embedding))
    decoder.positions = Embedding("transformer.wpe", config.max_position_embeddings, hidden)
    decoder.ignored = IGNORED | (IGNORED_WHEN_TIED if config.tied_head else {})
    return decoder


def _attention(config: ModelConfig) -> AttentionConfig:
    return AttentionConfig(
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        qkv_bias=True,
        out_bias=True,
        rotary_dim=0,
        projections=stacked("c_attn") if config.num_kv_heads == 1 else head_by_head("c_attn"),
        out_name="c_proj",
    )
