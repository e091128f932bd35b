"""Tiny checkpoints written to disk in a few milliseconds: a byte-level tokenizer and a random Llama or Qwen2.

Imports no transformers: the folders have the Hub's layout, so any loader can be tried on them. The weights are large
enough that attention is far from uniform: a wrong slot, position or mask changes the tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    *(("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("ĠĠĠĠ", "ĠĠĠĠ"), ("Ċ", "Ċ"), ("Ċ", "ĠĠĠĠ"), ("d", "e"), ("de", "f"), ("e", "r")),
    *(("r", "e"), ("i", "n"), ("o", "r"), ("o", "n"), ("s", "e"), ("re", "t"), ("u", "r"), ("ur", "n"), ("ret", "urn")),
    *(("Ġ", "="), ("Ġ", "in"), ("i", "f"), ("f", "or"), ("(", ")"), (")", ":"), ("se", "l"), ("sel", "f"), ("Ġ", "+")),
    *(
        ("a", "n"),
        ("a", "t"),
        ("e", "n"),
        ("l", "e"),
        ("m", "p"),
        ("i", "mp"),
        ("imp", "or"),
        ("impor", "t"),
        ("p", "t"),
    ),
    *(("p", "r"), ("in", "t"), ("pr", "int")),
    *(("_", "_"), ("=", "="), ("1", "0")),
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (the GPT-2 table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE tokenizer.json: 256 bytes, a few merges that code meets, then the special tokens."""
    vocabulary = byte_symbols() + ["".join(pair) for pair in MERGES]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": len(vocabulary) + index, "content": token, **flags} for index, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate([*vocabulary, *SPECIAL_TOKENS])},
            "merges": [" ".join(pair) for pair in MERGES],
        },
    }


VOCAB_SIZE = 256 + len(MERGES) + len(SPECIAL_TOKENS)
ENDOFTEXT, IM_START, IM_END = range(VOCAB_SIZE - 3, VOCAB_SIZE)


def llama_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny Llama with grouped heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
        "torch_dtype": "float32",
    } | overrides


def qwen2_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a tiny Qwen2: biases on q, k and v, tied head."""
    config = llama_config(architectures=["Qwen2ForCausalLM"], model_type="qwen2", tie_word_embeddings=True)
    for key in ("head_dim", "attention_bias", "mlp_bias"):
        del config[key]
    return config | {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": None} | overrides


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the Hub's names for a Llama or Qwen2 config."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    attention_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    weights: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: int, columns: int, gain: float, bias: bool) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.3

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)

    weights["model.embed_tokens.weight"] = 0.3 * torch.randn(config["vocab_size"], hidden, generator=generator)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        norm(f"{prefix}.post_attention_layernorm")
        linear(f"{prefix}.self_attn.q_proj", q, hidden, 1.5, attention_bias)
        linear(f"{prefix}.self_attn.k_proj", kv, hidden, 1.5, attention_bias)
        linear(f"{prefix}.self_attn.v_proj", kv, hidden, 1.0, attention_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, q, 1.5, config.get("attention_bias", False))
        for part in ("gate_proj", "up_proj"):
            linear(f"{prefix}.mlp.{part}", intermediate, hidden, 1.0, config.get("mlp_bias", False))
        linear(f"{prefix}.mlp.down_proj", hidden, intermediate, 1.5, config.get("mlp_bias", False))
    norm("model.norm")
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden, 1.5, False)
    return weights


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Writes a whole checkpoint folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, config["torch_dtype"])
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(config, seed).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": IM_START, "eos_token_id": [IM_END, ENDOFTEXT]},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHATML_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def tiny_llama(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A tiny random LlamaForCausalLM checkpoint; overrides replace config.json keys."""
    return write_checkpoint(folder, llama_config(**overrides), seed)


def tiny_qwen2(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A tiny random Qwen2ForCausalLM checkpoint; overrides replace config.json keys."""
    return write_checkpoint(folder, qwen2_config(**overrides), seed)
