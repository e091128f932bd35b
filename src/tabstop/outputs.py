"""The offline API's values, in vLLM's shape: SamplingParams in, RequestOutputs out. Knows no engine and no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tabstop.errors import InputError, NotSupportedError
from tabstop.grammar.specs import structured_constraint
from tabstop.types import ConstraintSpec

NEUTRAL: dict[str, Any] = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "detokenize": True,
    "spaces_between_special_tokens": True,
    "logits_processors": None,
}
"""Parameters of vLLM that are accepted at the value that changes nothing, and refused otherwise."""

NO_BEAMS = "beam search is not supported (n or best_of give several samples, best_of the likeliest of them)"

DEFAULTS: dict[str, Any] = {
    "best_of": None,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "penalty_window": 0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "truncate_prompt_tokens": None,
    "structured_outputs": None,
    "guided_decoding": None,
}
"""Parameters that are given by name; of the others the signature says it."""


@dataclass
class StructuredOutputsParams:
    """What the text may be; at most one of these. vLLM's names."""

    json: dict[str, Any] | str | None = None  # a schema
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark or GBNF
    json_object: bool | None = None


GuidedDecodingParams = StructuredOutputsParams
"""Its older name."""


@dataclass(init=False)
class SamplingParams:
    """How to continue a prompt; vLLM's names and defaults."""

    n: int
    temperature: float
    top_p: float
    top_k: int  # -1 or 0: all
    seed: int | None
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    max_tokens: int | None  # None: as many as fit the context
    min_tokens: int
    best_of: int | None  # so many samples, of which the n likeliest are the answer
    min_p: float
    typical_p: float
    repetition_penalty: float  # over prompt and output
    presence_penalty: float  # these two over the output
    frequency_penalty: float
    penalty_window: int  # over 0: all penalties look at so many last tokens, prompt or output
    logit_bias: dict[int, float]  # False bans a token
    allowed_token_ids: list[int] | None
    bad_words: list[str]
    logprobs: int | None  # so many likeliest tokens beside each token, 0 to 20
    prompt_logprobs: int | None  # the same of the prompt's tokens; it is then computed anew, whatever is cached
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    truncate_prompt_tokens: int | None  # -1: to what fits
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None
    guided_decoding: GuidedDecodingParams | dict[str, Any] | None  # its older name

    def __init__(
        self,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        seed: int | None = None,
        stop: str | list[str] | None = None,
        stop_token_ids: list[int] | None = None,
        ignore_eos: bool = False,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        **others: Any,
    ) -> None:
        """`others`: DEFAULTS, and NEUTRAL.

        Raises InputError for values out of range, NotSupportedError for parameters that would change the output.
        """
        self.n, self.temperature, self.top_p, self.top_k, self.seed = n, temperature, top_p, top_k, seed
        self.stop = _list_of("stop", [stop] if isinstance(stop, str) else stop, _is_text, "a text or a list of texts")
        self.stop_token_ids = _list_of("stop_token_ids", stop_token_ids, _is_token_id, "a list of token ids")
        self.ignore_eos, self.max_tokens, self.min_tokens = ignore_eos, max_tokens, min_tokens
        for name, value in (DEFAULTS | others).items():
            if name in DEFAULTS:
                setattr(self, name, value)
            elif name not in NEUTRAL:
                raise InputError(f"SamplingParams has no parameter {name!r}", param=name)
            elif value != NEUTRAL[name] and value is not None:
                why = NO_BEAMS if name == "use_beam_search" else f"{name} is not supported"
                raise NotSupportedError(f"{why}; leave {name} at {NEUTRAL[name]!r}", param=name)
        self._read_lists()
        self._check()
        self.constraints: tuple[ConstraintSpec, ...] = self._read_constraints()

    def _read_lists(self) -> None:
        """Raises InputError."""
        self.bad_words = _list_of("bad_words", self.bad_words, _is_text, "a list of texts")
        if self.allowed_token_ids is not None:
            ids = _list_of("allowed_token_ids", self.allowed_token_ids, _is_token_id, "a list of token ids")
            self.allowed_token_ids = ids
        biases: Any = self.logit_bias or {}
        if not isinstance(biases, dict) or not all(_is_number(bias) or bias is False for bias in biases.values()):
            raise InputError("logit_bias must be {token id: number, or False to ban it}", param="logit_bias")
        keys = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in biases]
        ids = _list_of("logit_bias", keys, _is_token_id, "{token id: number}")
        self.logit_bias = dict(zip(ids, biases.values(), strict=True))

    def _read_constraints(self) -> tuple[ConstraintSpec, ...]:
        """At most one. Raises InputError, NotSupportedError."""
        found = []
        for name in ("structured_outputs", "guided_decoding"):
            given = getattr(self, name)
            if isinstance(given, StructuredOutputsParams):
                given = {key: value for key, value in vars(given).items() if value is not None}
            if given is not None and not isinstance(given, dict):
                raise InputError(f"{name} must be a StructuredOutputsParams or a dict", param=name)
            if given and (spec := structured_constraint(given, name)) is not None:
                found.append(spec)
        if len(found) > 1:
            raise InputError("give structured_outputs or guided_decoding, not both", param="guided_decoding")
        return tuple(found)

    def _check(self) -> None:
        """Ranges beside those that the engine checks (engine/bounds.py)."""
        some = ("min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name, is_right, allowed in (
            ("n", _is_whole(self.n, 1), "a whole number of at least 1"),
            ("best_of", self.best_of is None or _is_whole(self.best_of, self.n), "None or at least n"),
            (
                "temperature",
                _is_number(self.temperature) and 0 <= self.temperature < math.inf,
                "a number of at least 0",
            ),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number over 0 and at most 1"),
            ("top_k", _is_whole(self.top_k, -1), "-1 (all) or a greater whole number"),
            ("seed", self.seed is None or _is_whole(self.seed, -math.inf), "None or a whole number"),
            ("min_tokens", _is_whole(self.min_tokens, 0), "a whole number of at least 0"),
            *((name, _is_count(getattr(self, name)), "None or a whole number from 0") for name in COUNTS),
            ("penalty_window", _is_whole(self.penalty_window, 0), "a whole number of at least 0"),
            ("truncate_prompt_tokens", _is_truncation(self.truncate_prompt_tokens), "None, -1 or over 0"),
            *((name, _is_number(getattr(self, name)), "a number") for name in some),
            *((name, isinstance(getattr(self, name), bool), "True or False") for name in FLAGS),
        ):
            if not is_right:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {allowed}", param=name)


FLAGS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


COUNTS = ("logprobs", "prompt_logprobs", "max_tokens")


def _is_count(value: Any) -> bool:
    return value is None or _is_whole(value, 0)


def _is_truncation(value: Any) -> bool:
    return value is None or (_is_whole(value, -1) and value != 0)


def _is_whole(value: Any, minimum: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token_id(value: Any) -> bool:
    return _is_whole(value, 0) and value < 1 << 32


def _list_of(name: str, value: Any, is_right: Callable[[Any], bool], allowed: str) -> list[Any]:
    """A parameter's entries; None has none. Raises InputError."""
    entries = [] if value is None else value
    if not isinstance(entries, list | tuple | set | frozenset) or not all(map(is_right, entries)):
        raise InputError(f"{name} is {value!r}; it must be {allowed}", param=name)
    return list(entries)


@dataclass(frozen=True)
class Logprob:
    """Of one token, at temperature 1 and before biases and penalties."""

    logprob: float
    rank: int  # 1: the likeliest
    decoded_token: str


@dataclass
class CompletionOutput:
    """One sample."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it, None for the end token
    cumulative_logprob: float | None = None  # this and the next only where SamplingParams.logprobs is given
    logprobs: list[dict[int, Logprob]] | None = None  # for each token: the likeliest ones and itself, by token id
    reasoning: str | None = None  # of a chat with a model that thinks: what of `text` it thought,
    content: str | None = None  # and what it answered


@dataclass
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """None for the first token, of which nothing is known; then as CompletionOutput.logprobs. Only where asked for."""
