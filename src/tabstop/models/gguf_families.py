"""What GGUF files of each architecture look like beside the Hub's: names of tensors, keys, orders of rows, offsets.

After the converters and loaders of llama.cpp, which fix all this by architecture, not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RMS_EPSILON = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LAYER_EPSILON = {"attention.layer_norm_epsilon": "norm_eps"}


@dataclass(frozen=True, slots=True)
class GGUFFamily:
    """One general.architecture."""

    architecture: str  # the Hub's
    names: Mapping[str, str]  # tensor name → the Hub's, as regular expressions; other names stay as they are
    epsilon: Mapping[str, str] = field(default_factory=lambda: RMS_EPSILON)  # required metadata key → config key
    keys: Mapping[str, str] = field(default_factory=dict)  # further metadata keys → config keys
    values: Mapping[str, Any] = field(default_factory=dict)  # config keys that the architecture fixes
    has_pairs: bool = False  # rows of q and k lie in rotary pairs, where the Hub has halves
    has_stacked_heads: bool = False  # all q, all k, all v heads in a matrix where the Hub has head after head
    norm_offset: float = 0.0  # what the file's norm weights have more than the Hub's


def _layer_names(**names: str) -> dict[str, str]:
    """attn_output='self_attn.dense' → the regular expression for every layer."""
    return {rf"blk\.(\d+)\.{ours}\.(.+)": rf"model.layers.\1.{theirs}.\2" for ours, theirs in names.items()}


LLAMA_NAMES = {
    r"token_embd\.(.+)": r"model.embed_tokens.\1",
    r"output_norm\.(.+)": r"model.norm.\1",
    r"output\.(.+)": r"lm_head.\1",
} | _layer_names(
    attn_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
    ffn_gate="mlp.gate_proj",
    ffn_up="mlp.up_proj",
    ffn_down="mlp.down_proj",
)
STACKED_GATE = _layer_names(ffn_up="mlp.gate_up_proj")
SILU = {"hidden_act": "silu"}


def _renamed(names: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {ours: theirs.replace("model.layers.", prefix) for ours, theirs in names.items()}


STARCODER_NAMES = {
    r"token_embd\.(.+)": r"transformer.wte.\1",
    r"position_embd\.(.+)": r"transformer.wpe.\1",
    r"output_norm\.(.+)": r"transformer.ln_f.\1",
    r"output\.(.+)": r"lm_head.\1",
} | _renamed(
    _layer_names(
        attn_norm="ln_1",
        attn_qkv="attn.c_attn",
        attn_output="attn.c_proj",
        ffn_norm="ln_2",
        ffn_up="mlp.c_fc",
        ffn_down="mlp.c_proj",
    ),
    "transformer.h.",
)
NEOX_NAMES = {
    r"token_embd\.(.+)": r"gpt_neox.embed_in.\1",
    r"output_norm\.(.+)": r"gpt_neox.final_layer_norm.\1",
    r"output\.(.+)": r"embed_out.\1",
} | _renamed(
    _layer_names(
        attn_norm="input_layernorm",
        attn_qkv="attention.query_key_value",
        attn_output="attention.dense",
        ffn_norm="post_attention_layernorm",
        ffn_up="mlp.dense_h_to_4h",
        ffn_down="mlp.dense_4h_to_h",
    ),
    "gpt_neox.layers.",
)

GGUF_FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("LlamaForCausalLM", LLAMA_NAMES, values=SILU, has_pairs=True),
    "qwen2": GGUFFamily("Qwen2ForCausalLM", LLAMA_NAMES, values=SILU),
    "qwen3": GGUFFamily(
        "Qwen3ForCausalLM",
        LLAMA_NAMES | _layer_names(attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm"),
        values=SILU,
    ),
    "starcoder2": GGUFFamily(
        "Starcoder2ForCausalLM", LLAMA_NAMES | _layer_names(ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"), LAYER_EPSILON
    ),
    "starcoder": GGUFFamily("GPTBigCodeForCausalLM", STARCODER_NAMES, LAYER_EPSILON),
    "gemma": GGUFFamily("GemmaForCausalLM", LLAMA_NAMES, norm_offset=1.0),
    "phi2": GGUFFamily(
        "PhiForCausalLM",
        LLAMA_NAMES
        | {r"output_norm\.(.+)": r"model.final_layernorm.\1"}
        | _layer_names(attn_output="self_attn.dense", ffn_up="mlp.fc1", ffn_down="mlp.fc2"),
        LAYER_EPSILON,
    ),
    "phi3": GGUFFamily(
        "Phi3ForCausalLM", LLAMA_NAMES | _layer_names(attn_qkv="self_attn.qkv_proj") | STACKED_GATE, values=SILU
    ),
    "stablelm": GGUFFamily(
        "StableLmForCausalLM",
        LLAMA_NAMES,
        LAYER_EPSILON,
        keys={"use_parallel_residual": "use_parallel_residual"},
        values=SILU,
    ),
    "gptneox": GGUFFamily(
        "GPTNeoXForCausalLM",
        NEOX_NAMES,
        LAYER_EPSILON,
        keys={"use_parallel_residual": "use_parallel_residual"},
        has_stacked_heads=True,
    ),
    "granite": GGUFFamily(
        "GraniteForCausalLM",
        LLAMA_NAMES,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        values=SILU,
        has_pairs=True,
    ),
    "chatglm": GGUFFamily("GlmForCausalLM", LLAMA_NAMES | STACKED_GATE, values=SILU),
    "glm4": GGUFFamily(
        "Glm4ForCausalLM",
        LLAMA_NAMES
        | STACKED_GATE
        | _layer_names(post_attention_norm="post_self_attn_layernorm", post_ffw_norm="post_mlp_layernorm"),
        values=SILU,
    ),
}
"""general.architecture → what its files look like."""
