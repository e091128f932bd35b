"""A model's dimensions, read once from a config.json-shaped mapping into our own frozen type. Knows no torch.

Every value that changes the mathematics is either understood here (or by the family that asks for it through `values`)
or refused by its name: nothing is silently ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from tabstop.checkpoint import Checkpoint
from tabstop.errors import UnsupportedModelError
from tabstop.models import FAMILIES
from tabstop.models.gguf_header import shown
from tabstop.models.rope import RopeConfig, RopeRequest, read_rope
from tabstop.models.spelling import COMMON, SPELLINGS, Spelling
from tabstop.models.values import ConfigValues

MAX_LAYERS, MAX_HEAD_DIM = 4096, 65536
"""A damaged file must not make us build a billion layers before its tensors are compared."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What all decoder families share. What only one family knows, its builder reads from `values`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    tied_head: bool
    max_position_embeddings: int  # the longest text that the model can serve, with its rope's scaling
    dtype: str | None  # of the checkpoint's float weights, as the Hub spells it; None when it does not say
    quantization: str  # quant/ registry name
    values: ConfigValues


def read_model_config(checkpoint: Checkpoint, max_model_len: int | None = None) -> ModelConfig:
    """The checkpoint's config, checked; what scales with the longest text is fixed for `max_model_len`.

    Raises UnsupportedModelError naming key, value and what is known.
    """
    origin = str(checkpoint.gguf or f"{checkpoint.folder}/config.json")
    architecture = _architecture(ConfigValues(checkpoint.config, origin))
    spelling = SPELLINGS.get(architecture, COMMON)
    values = ConfigValues(spelling.common(checkpoint.config), origin, spelling.names)
    hidden_size, num_heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    head_dim = _head_dim(values, hidden_size, num_heads)
    num_kv_heads = _num_kv_heads(values, spelling, num_heads)
    if num_heads % num_kv_heads:
        raise values.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    rope, longest = _rope(values, spelling, head_dim, max_model_len)
    return ModelConfig(
        architecture=architecture,
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=values.integer("intermediate_size", _usual_intermediate_size(spelling, hidden_size)),
        num_layers=values.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=values.number("norm_eps", 1e-6),
        rope=rope,
        tied_head=values.boolean("tie_word_embeddings", False),
        max_position_embeddings=longest,
        dtype=_dtype(values),
        quantization="gguf" if checkpoint.gguf else _quantization(values),
        values=values,
    )


def _num_kv_heads(values: ConfigValues, spelling: Spelling, num_heads: int) -> int:
    if "multi_query" in spelling.defaults:
        return 1 if values.boolean("multi_query", True) else num_heads
    return values.integer("num_key_value_heads", num_heads)


def _usual_intermediate_size(spelling: Spelling, hidden_size: int) -> int | None:
    """GPT-2's descendants may leave it out."""
    return 4 * hidden_size if spelling.names.get("intermediate_size") == "n_inner" else None


def _rope(values: ConfigValues, spelling: Spelling, head_dim: int, max_model_len: int | None) -> tuple[RopeConfig, int]:
    """(rotary embedding, of nothing for a family without; the longest text)."""
    trained_len = values.integer("max_position_embeddings", 2048)
    if not spelling.rotary:
        return RopeConfig(10000.0, 0), trained_len
    if head_dim % 2:
        raise UnsupportedModelError(f"{values.origin}: head_dim is {head_dim}; rotary embeddings need an even number")
    return read_rope(values, RopeRequest(head_dim, spelling.partial, trained_len, max_model_len))


def _architecture(values: ConfigValues) -> str:
    names = values.values.get("architectures")
    if not isinstance(names, list) or not names or names[0] not in FAMILIES:
        raise values.refuse("architectures", ", ".join(FAMILIES))
    return str(names[0])


def _head_dim(values: ConfigValues, hidden_size: int, num_heads: int) -> int:
    if values.values.get("head_dim") is None and hidden_size % num_heads:
        raise values.refuse("hidden_size", f"a multiple of num_attention_heads ({num_heads}) when head_dim is missing")
    return values.integer("head_dim", max(1, hidden_size // num_heads), MAX_HEAD_DIM)


def _dtype(values: ConfigValues) -> str | None:
    for key in ("dtype", "torch_dtype"):
        values.require(key, None, "float32", "bfloat16", "float16")
        if values.values.get(key) is not None:
            return str(values.values[key])
    return None


def _quantization(values: ConfigValues) -> str:
    quantization = values.values.get("quantization_config")
    if quantization is None:
        return "dense"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    raise UnsupportedModelError(
        f"{values.origin}: quantization_config.quant_method is {shown(method)}; known: none (plain float weights) and "
        "GGUF files; use such a version of the model"
    )
