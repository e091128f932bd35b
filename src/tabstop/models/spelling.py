"""How families spell the config keys that all decoders share, and what a key that is missing means to them.

The defaults are those of the Hub's reference implementation: published files leave out what equals them. Only where
they differ from the common ones (models/config.py) are they listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Spelling:
    """One architecture's way to write a config."""

    names: Mapping[str, str] = field(default_factory=dict)  # the common key → the file's
    defaults: Mapping[str, Any] = field(default_factory=dict)  # by common key
    rotary: bool = True  # whether positions are rotations; else head_dim may be odd

    @property
    def partial(self) -> bool:
        """Whether a part of each head may stay unturned."""
        return "partial_rotary_factor" in self.defaults

    def common(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config under the common keys, with this architecture's defaults."""
        renamed = {common: config[name] for common, name in self.names.items() if name in config}
        return {**self.defaults, **config, **renamed}


_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}
_RMS, _LAYER = {"norm_eps": "rms_norm_eps"}, {"norm_eps": "layer_norm_eps"}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_GLM = {
    "head_dim": 128,
    "num_key_value_heads": 2,
    "norm_eps": 1.5625e-07,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}

_CHATGLM_NAMES = {
    "vocab_size": "padded_vocab_size",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels",
    "num_key_value_heads": "multi_query_group_num",
    "norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "seq_length",
    "attention_bias": "add_qkv_bias",
}

COMMON = Spelling(_RMS)

SPELLINGS: dict[str, Spelling] = {
    "MistralForCausalLM": Spelling(_RMS, _MISTRAL),
    "MinistralForCausalLM": Spelling(_RMS, _MISTRAL),
    "Ministral3ForCausalLM": Spelling(
        _RMS, {"head_dim": 128, "num_key_value_heads": 8, "norm_eps": 1e-5, "max_position_embeddings": 262144}
    ),
    "Qwen2ForCausalLM": Spelling(_RMS, {"num_key_value_heads": 32, "max_position_embeddings": 32768}),
    "Qwen3ForCausalLM": Spelling(_RMS, {"head_dim": 128, "num_key_value_heads": 32, "max_position_embeddings": 32768}),
    "Starcoder2ForCausalLM": Spelling(
        {"norm_eps": "norm_epsilon"},
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "GPTBigCodeForCausalLM": Spelling(
        _GPT2_NAMES,
        {
            "max_position_embeddings": 1024,
            "norm_eps": 1e-5,
            "hidden_act": "gelu_pytorch_tanh",
            "multi_query": True,
            "tie_word_embeddings": True,
        },
        rotary=False,
    ),
    "CodeGenForCausalLM": Spelling(
        _GPT2_NAMES,
        {"norm_eps": 1e-5, "hidden_act": "gelu_new", "rotary_dim": 64, "partial_rotary_factor": None},
    ),
    "GemmaForCausalLM": Spelling(
        _RMS,
        {
            "head_dim": 256,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
    "PhiForCausalLM": Spelling(_LAYER, {"norm_eps": 1e-5, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5}),
    "Phi3ForCausalLM": Spelling(
        _RMS,
        {
            "norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
    ),
    "StableLmForCausalLM": Spelling(
        _LAYER,
        {
            "num_key_value_heads": 32,
            "norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 0.25,
        },
    ),
    "GPTNeoXForCausalLM": Spelling(
        _LAYER | {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
        {"norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25},
    ),
    "ChatGLMModel": Spelling(_CHATGLM_NAMES, {"norm_eps": 1e-5, "partial_rotary_factor": 0.5, "attention_bias": False}),
    "GlmForCausalLM": Spelling(_RMS, _GLM),
    "Glm4ForCausalLM": Spelling(_RMS, _GLM),
}
"""Architecture → its spelling, where it is not COMMON."""
