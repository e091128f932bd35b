"""The offline API's values, in vLLM's shape: SamplingParams in, RequestOutputs out. Knows no engine and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tabstop.errors import InputError, NotSupportedError

NEUTRAL: dict[str, Any] = {
    "best_of": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "logits_processors": None,
    "include_stop_str_in_output": False,
    "truncate_prompt_tokens": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
}
"""Parameters of vLLM that are accepted at the value that changes nothing, and refused otherwise."""


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
        """Raises InputError for values out of range, NotSupportedError for parameters that would change the output."""
        self.n, self.temperature, self.top_p, self.top_k, self.seed = n, temperature, top_p, top_k, seed
        self.stop = [stop] if isinstance(stop, str) else list(stop or ())
        self.stop_token_ids = list(stop_token_ids or ())
        self.ignore_eos, self.max_tokens, self.min_tokens = ignore_eos, max_tokens, min_tokens
        for name, value in others.items():
            if name not in NEUTRAL:
                raise InputError(f"SamplingParams has no parameter {name!r}", param=name)
            if value != NEUTRAL[name] and value is not None:
                raise NotSupportedError(f"{name} is not supported yet; leave it at {NEUTRAL[name]!r}", param=name)
        self._check()

    def _check(self) -> None:
        for name, is_right, allowed in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 (all) or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 0, "None or at least 0"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
        ):
            if not is_right:
                raise InputError(f"{name} is {getattr(self, name)}; it must be {allowed}", param=name)


@dataclass
class CompletionOutput:
    """One sample."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string or token that ended it, None for the end token
    cumulative_logprob: float | None = None
    logprobs: None = None


@dataclass
class RequestOutput:
    """The answer to one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: None = None
