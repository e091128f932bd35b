"""Which rotary embedding a config asks for, as data. Knows the Hub's spellings; the arithmetic is layers/rope.py's.

Scalings that other engines change while a text grows are fixed here, by the longest text that will be served: a cached
key must stay right for whatever follows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tabstop.errors import UnsupportedModelError
from tabstop.models.gguf_header import shown
from tabstop.models.values import ConfigValues


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
class YarnScaling:
    """YaRN (Peng et al., 2023): as Llama 3's, with the passage linear in the number of the pair.

    A pair that turns `beta_fast` times within the original context is the last to be kept, one that turns `beta_slow`
    times the first to be divided by `factor`. Cosines and sines are multiplied by `magnitude`.
    """

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # the passage's ends are whole pairs
    magnitude: float


@dataclass(frozen=True, slots=True)
class Divisors:
    """One divisor for each rotary frequency: longrope's, or those that GGUF files precompute (rope_freqs.weight)."""

    values: tuple[float, ...]
    magnitude: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | Divisors


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of the first `rotary_dim` values of each head; 0: positions are no rotations."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class RopeRequest:
    """What a config's rope is read against."""

    head_dim: int
    partial: bool  # whether the family can leave a part of the head unturned
    trained_len: int  # max_position_embeddings
    max_model_len: int | None  # the longest text that will be served; None: the longest possible


def read_rope(values: ConfigValues, request: RopeRequest) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the longest text that it allows.

    Reads both spellings: rope_theta beside rope_scaling, and rope_parameters that holds everything. Raises
    UnsupportedModelError.
    """
    combined = values.values.get("rope_parameters")
    nested = combined if combined is not None else values.values.get("rope_scaling") or {}
    key = "rope_scaling" if combined is None else "rope_parameters"
    if not isinstance(nested, Mapping):
        raise values.refuse(key, "an object with rope_type")
    inner = ConfigValues(nested, f"{values.origin}, {key}")
    rotary_dim = _rotary_dim(values, inner, request)
    theta = inner.number("rope_theta", values.number("rope_theta", 10000.0 * values.number("rope_ratio", 1.0)))
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if kind == "dynamic":
        return _dynamic(theta, inner, rotary_dim, request)
    if kind == "yarn":
        scaling = _yarn(values, inner, request.trained_len)
        return RopeConfig(theta, rotary_dim, scaling), _stretched(request, scaling.factor * scaling.original_context)
    return RopeConfig(
        theta, rotary_dim, _fixed_scaling(kind, values, inner, (rotary_dim, request))
    ), request.trained_len


def _stretched(request: RopeRequest, length: float) -> int:
    return max(request.trained_len, int(length))


def _rotary_dim(values: ConfigValues, inner: ConfigValues, request: RopeRequest) -> int:
    place = inner if inner.values.get("partial_rotary_factor") is not None else values
    if not request.partial:
        place.require("partial_rotary_factor", None, 1.0)
    elif values.values.get("rotary_dim") is not None:
        return values.integer("rotary_dim", maximum=request.head_dim)
    rotary_dim = int(request.head_dim * place.number("partial_rotary_factor", 1.0))
    if rotary_dim % 2 or not 2 <= rotary_dim <= request.head_dim:
        raise place.refuse("partial_rotary_factor", f"a part of head_dim ({request.head_dim}) that is an even number")
    return rotary_dim


def _dynamic(theta: float, inner: ConfigValues, rotary_dim: int, request: RopeRequest) -> tuple[RopeConfig, int]:
    """NTK-aware scaling (a larger base) for the longest text; the published rule lets the base grow with the text."""
    factor = inner.number("factor")
    longest = _stretched(request, factor * request.trained_len)
    length = min(request.max_model_len or longest, longest)
    if length > request.trained_len and rotary_dim > 2:
        growth = factor * length / request.trained_len - (factor - 1)
        theta *= growth ** (rotary_dim / (rotary_dim - 2))
    return RopeConfig(theta, rotary_dim), longest


def _fixed_scaling(
    kind: object, values: ConfigValues, inner: ConfigValues, sizes: tuple[int, RopeRequest]
) -> RopeScaling | None:
    """Scalings under which max_position_embeddings is the stretched length already."""
    rotary_dim, request = sizes
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(inner.number("factor"))
    if kind == "llama3":
        return _llama3(inner, request.trained_len)
    if kind in ("longrope", "su"):
        return _longrope(values, inner, rotary_dim // 2, request)
    if kind == "divisors":
        return Divisors(inner.numbers("divisors", rotary_dim // 2))
    raise UnsupportedModelError(
        f"{inner.origin}: rope_type is {shown(kind)}; known: 'default', 'linear', 'dynamic', 'yarn', 'longrope', "
        "'llama3'"
    )


def _llama3(inner: ConfigValues, trained_len: int) -> Llama3Scaling:
    context = inner.integer("original_max_position_embeddings", trained_len)
    slow, fast = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if fast <= slow:
        raise inner.refuse("high_freq_factor", f"a number over low_freq_factor ({slow})")
    return Llama3Scaling(inner.number("factor"), slow, fast, context)


def _original_context(values: ConfigValues, inner: ConfigValues, trained_len: int) -> int:
    """Beside the object (Phi), or inside it, or what the model was trained on."""
    outer = values.integer("original_max_position_embeddings", trained_len)
    if values.values.get("original_max_position_embeddings") is not None:
        return outer
    return inner.integer("original_max_position_embeddings", trained_len)


def _yarn(values: ConfigValues, inner: ConfigValues, trained_len: int) -> YarnScaling:
    context = _original_context(values, inner, trained_len)
    factor = inner.number("factor", trained_len / context)
    magnitude = _yarn_magnitude(factor, 1.0)
    if inner.values.get("mscale") and inner.values.get("mscale_all_dim"):
        both = inner.number("mscale"), inner.number("mscale_all_dim")
        magnitude = _yarn_magnitude(factor, both[0]) / _yarn_magnitude(factor, both[1])
    return YarnScaling(
        factor,
        context,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=inner.boolean("truncate", True),
        magnitude=inner.number("attention_factor", magnitude),
    )


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def _longrope(values: ConfigValues, inner: ConfigValues, num_pairs: int, request: RopeRequest) -> Divisors:
    """LongRoPE (Ding et al., 2024): a list of divisors for texts beyond the original context, another for shorter."""
    context = _original_context(values, inner, request.trained_len)
    factor = inner.number("factor", request.trained_len / context)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    short, long = inner.numbers("short_factor", num_pairs), inner.numbers("long_factor", num_pairs)
    length = request.max_model_len or request.trained_len
    return Divisors(long if length > context else short, inner.number("attention_factor", magnitude))
