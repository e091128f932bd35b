"""GLM-4 in its first form (CodeGeeX4, glm-4-9b): as models/glm.py under other names, q, k and v as one matrix."""

from __future__ import annotations

from tabstop.layers import Shard
from tabstop.layers.attention import Attention
from tabstop.layers.linear import Embedding, Head, Linear, Part
from tabstop.layers.mlp import GatedMLP
from tabstop.layers.norm import RMSNorm
from tabstop.layers.projections import stacked
from tabstop.layers.rope import Rope
from tabstop.models.config import ModelConfig
from tabstop.models.decoder import Block, Decoder
from tabstop.models.llama import attention_config
from tabstop.quant import Placement

IGNORED = {r"transformer\.rotary_pos_emb\.inv_freq": "computed from the config"}
FIXED = {
    "rmsnorm": True,
    "original_rope": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "tie_word_embeddings": False,
}
"""What all files of this form say, and nothing else is known."""


class ChatGLMMLP(GatedMLP):
    """Gate and up as one matrix, gate first, under this form's names."""

    def __init__(self, prefix: str, hidden_size: int, size: int, shard: Shard) -> None:
        super().__init__(prefix, hidden_size, size, shard=shard)
        self.down = Linear(prefix, size, [Part("dense_4h_to_h", hidden_size)], split=shard.columns)

    def gate_and_up(self, size: int) -> list[Part]:
        return [Part("dense_h_to_4h", size, placement=Placement(2 * size, size, (start,))) for start in (0, size)]


def chatglm(config: ModelConfig, shard: Shard) -> Decoder:
    for key, known in FIXED.items():
        config.values.require(key, None, known)
    attention = attention_config(
        config,
        qkv_bias=config.values.boolean("attention_bias", False),
        interleaved=True,
        projections=stacked("query_key_value"),
        out_name="dense",
    )

    def norm(name: str) -> RMSNorm:
        return RMSNorm(f"transformer.encoder.{name}", config.hidden_size, config.norm_eps)

    def block(index: int) -> Block:
        prefix = f"transformer.encoder.layers.{index}"
        return Block(
            norm(f"layers.{index}.input_layernorm"),
            Attention(f"{prefix}.self_attention", index, attention, shard),
            norm(f"layers.{index}.post_attention_layernorm"),
            ChatGLMMLP(f"{prefix}.mlp", config.hidden_size, config.intermediate_size, shard),
        )

    decoder = Decoder(
        Embedding("transformer.embedding.word_embeddings", config.vocab_size, config.hidden_size),
        Rope(config.rope, config.head_dim),
        [block(index) for index in range(config.num_layers)],
        norm("final_layernorm"),
        Head("", config.hidden_size, [Part("transformer.output_layer", config.vocab_size)]),
    )
    decoder.ignored = IGNORED
    return decoder
