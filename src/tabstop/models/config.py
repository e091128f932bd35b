"""A model's dimensions, read once from a config.json-shaped mapping into our own frozen type. Knows no torch.

Every value that changes the mathematics is either understood here (or by the family that asks for it through `values`)
or refused by its name: nothing is silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tabstop.cache import CacheKind, CacheSpec
from tabstop.checkpoint import Checkpoint
from tabstop.errors import UnsupportedModelError
from tabstop.models import FAMILIES
from tabstop.models.gguf_header import shown

MAX_LAYERS, MAX_HEAD_DIM = 4096, 65536
"""A damaged file must not make us build a billion layers before its tensors are compared."""


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """Typed reads of a config mapping; every refusal names the file, the key, the value and what is known."""

    values: Mapping[str, Any]
    origin: str  # for messages

    def refuse(self, key: str, known: str) -> UnsupportedModelError:
        value = f"is {shown(self.values[key])}" if key in self.values else "is missing"
        return UnsupportedModelError(f"{self.origin}: {key} {value}; known: {known}")

    def integer(self, key: str, default: int | None = None, maximum: int = 1 << 31) -> int:
        """A positive whole number; a missing or null key takes the default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.refuse(key, f"a whole number from 1 to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; a missing or null key takes the default."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refuse(key, "a number over 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true, false")
        return value

    def require(self, key: str, *known: Any) -> None:
        """Refuses any other value than `known`; a missing key counts as None."""
        if self.values.get(key) not in known:
            raise self.refuse(key, ", ".join(repr(value) for value in known if value is not None))


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule: slow rotations divided by `factor`, fast ones kept, a linear passage between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Divisors:
    """One divisor for each rotary frequency, as GGUF files precompute them (rope_freqs.weight)."""

    values: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | Divisors


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding over the whole head."""

    theta: float
    scaling: RopeScaling | None = None


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
    max_position_embeddings: int
    dtype: str | None  # of the checkpoint's float weights, as the Hub spells it; None when it does not say
    quantization: str  # quant/ registry name
    values: ConfigValues

    @property
    def cache_specs(self) -> list[CacheSpec]:
        """What the layers remember, without building them."""
        return [CacheSpec(CacheKind.PAGED, self.num_kv_heads, self.head_dim)] * self.num_layers


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """The checkpoint's config, checked. Raises UnsupportedModelError naming key, value and what is known."""
    origin = str(checkpoint.gguf or f"{checkpoint.folder}/config.json")
    values = ConfigValues(checkpoint.config, origin)
    architecture = _architecture(values)
    hidden_size, num_heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    head_dim = _head_dim(values, hidden_size, num_heads)
    num_kv_heads = values.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise values.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    return ModelConfig(
        architecture=architecture,
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=values.integer("intermediate_size"),
        num_layers=values.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=values.number("rms_norm_eps", 1e-6),
        rope=_rope(values, head_dim),
        tied_head=values.boolean("tie_word_embeddings", False),
        max_position_embeddings=values.integer("max_position_embeddings", 2048),
        dtype=_dtype(values),
        quantization="gguf" if checkpoint.gguf else _quantization(values),
        values=values,
    )


def _architecture(values: ConfigValues) -> str:
    names = values.values.get("architectures")
    if not isinstance(names, list) or not names or names[0] not in FAMILIES:
        raise values.refuse("architectures", ", ".join(FAMILIES))
    return str(names[0])


def _head_dim(values: ConfigValues, hidden_size: int, num_heads: int) -> int:
    if values.values.get("head_dim") is None and hidden_size % num_heads:
        raise values.refuse("hidden_size", f"a multiple of num_attention_heads ({num_heads}) when head_dim is missing")
    head_dim = values.integer("head_dim", max(1, hidden_size // num_heads), MAX_HEAD_DIM)
    if head_dim % 2:
        raise UnsupportedModelError(f"{values.origin}: head_dim is {head_dim}; rotary embeddings need an even number")
    return head_dim


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


def _rope(values: ConfigValues, head_dim: int) -> RopeConfig:
    """Reads both spellings: rope_theta beside rope_scaling, and rope_parameters that holds everything."""
    combined = values.values.get("rope_parameters")
    nested = combined if combined is not None else values.values.get("rope_scaling") or {}
    key = "rope_scaling" if combined is None else "rope_parameters"
    if not isinstance(nested, Mapping):
        raise values.refuse(key, "an object with rope_type")
    inner = ConfigValues(nested, f"{values.origin}, {key}")
    for place in (values, inner):
        place.require("partial_rotary_factor", None, 1.0)
    theta = inner.number("rope_theta", values.number("rope_theta", 10000.0))
    return RopeConfig(theta, _rope_scaling(values, inner, head_dim))


def _rope_scaling(values: ConfigValues, inner: ConfigValues, head_dim: int) -> RopeScaling | None:
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(inner.number("factor"))
    if kind == "llama3":
        context = inner.integer("original_max_position_embeddings", values.integer("max_position_embeddings"))
        slow, fast = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if fast <= slow:
            raise inner.refuse("high_freq_factor", f"a number over low_freq_factor ({slow})")
        return Llama3Scaling(inner.number("factor"), slow, fast, context)
    if kind == "divisors":
        return Divisors(_divisors(inner, head_dim))
    raise UnsupportedModelError(f"{inner.origin}: rope_type is {shown(kind)}; known: 'default', 'linear', 'llama3'")


def _divisors(inner: ConfigValues, head_dim: int) -> tuple[float, ...]:
    divisors = inner.values.get("divisors")
    numbers = [each for each in divisors if isinstance(each, float)] if isinstance(divisors, list) else []
    if len(numbers) != head_dim // 2 or not all(0 < number < float("inf") for number in numbers):
        raise inner.refuse("divisors", f"{head_dim // 2} numbers over 0 (rope_freqs.weight in a GGUF file)")
    return tuple(numbers)
