"""How a body's tokens are drawn and reported: the fields of Call that every dialect's names lead to."""

from __future__ import annotations

from typing import Any

from tabstop.api.schema import Generation
from tabstop.errors import InputError, NotSupportedError


def sampling_fields(body: Generation) -> dict[str, Any]:
    """Raises InputError naming the parameter."""
    num_shown, top_p = body.n or 1, body.top_p
    num_samples = body.best_of or num_shown
    if num_samples < num_shown:
        raise InputError(f"best_of is {num_samples}; it must be at least n, which is {num_shown}", param="best_of")
    if num_samples > num_shown and body.stream:
        raise InputError("best_of needs the whole answer; leave stream out", param="best_of")
    return {
        "temperature": 0.0 if top_p == 0 else body.temperature,  # no token but the most likely one
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "top_p": top_p or None,
        "seed": body.seed,
        "min_p": body.min_p,
        "typical_p": body.typical_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        **_biases(body.logit_bias),
        "allowed_token_ids": None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        "bad_words": tuple(body.bad_words or ()),
        "show_control": body.skip_special_tokens is False,
        "truncate_prompt": _truncation(body.truncate_prompt_tokens),
        "num_samples": num_samples,
        "num_best": num_shown if num_samples > num_shown else None,
    }


def _biases(given: dict[str, float | bool] | list[tuple[int | str, float | bool]] | None) -> dict[str, Any]:
    """An object or pairs; false bans. Raises InputError, also for texts: they may have several tokens."""
    pairs = list(given.items() if isinstance(given, dict) else given or ())
    for key, bias in pairs:
        if isinstance(key, str) and not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InputError("logit_bias takes token ids; POST /tokenize gives those of a text", param="logit_bias")
        if bias is True:
            raise InputError("a logit_bias is a number, or false to ban the token", param="logit_bias")
    return {
        "logit_bias": tuple((int(key), float(bias)) for key, bias in pairs if bias is not False),
        "banned_ids": tuple(int(key) for key, bias in pairs if bias is False),
    }


def _truncation(num_tokens: int | None) -> int | None:
    if num_tokens == 0:
        raise InputError("truncate_prompt_tokens must be over 0, or -1 for what fits", param="truncate_prompt_tokens")
    return None if num_tokens is None else max(0, num_tokens)


def num_prompt_logprobs(body: Generation) -> int | None:
    """Raises InputError."""
    if body.prompt_logprobs is not None and body.stream:
        raise InputError("prompt_logprobs needs the whole answer; leave stream out", param="prompt_logprobs")
    return body.prompt_logprobs


def refuse_prompt_logprobs(body: Generation) -> None:
    """Raises NotSupportedError in dialects that have no form for them."""
    if body.prompt_logprobs is not None:
        message = "`prompt_logprobs`: only /v1/completions and /v1/chat/completions have it; leave it out"
        raise NotSupportedError(message, param="prompt_logprobs")


def chat_num_logprobs(body: Generation) -> int | None:
    """Raises InputError."""
    if body.logprobs is None or isinstance(body.logprobs, bool):
        if body.top_logprobs and not body.logprobs:
            raise InputError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None
    raise InputError("chats take `logprobs` as true or false, and a number as `top_logprobs`", param="logprobs")
