"""What a call may ask for, which engines have room for it, and where its samples end. Knows no text and no HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import structs

from tabstop.answer import EncodedPrompt
from tabstop.call import Call
from tabstop.encoding import too_long
from tabstop.engine.client import EngineClient
from tabstop.errors import ContextLengthError, DeadlineError, InputError, OverloadedError, TabstopError
from tabstop.types import EngineInfo, Limits

MAX_CHOICES = 1024
"""Most samples of one call, over all of its prompts."""

MAX_STOP_CHARACTERS = 8192
"""All stop strings of a call together: their automaton has a state for each character."""


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What a call may ask for at most."""

    max_num_samples: int = 32
    max_stop_strings: int = 64
    max_logit_biases: int = 1024
    max_prompt_tokens: int | None = None
    max_request_tokens: int = 1 << 20  # prompts, and the completions of all samples
    max_queue_age: float | None = None  # seconds


def check_call(call: Call, limits: ServiceLimits, info: EngineInfo) -> None:
    """Limits that hold whatever the dialect. Raises InputError."""
    if not 1 <= call.num_samples <= limits.max_num_samples:
        raise InputError(f"n, or best_of, is {call.num_samples}; it must be 1 to {limits.max_num_samples}", param="n")
    if not 1 <= len(call.prompts) * call.num_samples <= MAX_CHOICES:
        raise InputError(f"prompts × n is not between 1 and {MAX_CHOICES}; send fewer prompts", param="prompt")
    if len(call.stop_strings) > limits.max_stop_strings:
        raise InputError(f"at most {limits.max_stop_strings} stop strings are allowed", param="stop")
    if not all(call.stop_strings):
        raise InputError("a stop string is empty; leave it out", param="stop")
    if sum(map(len, call.stop_strings)) > MAX_STOP_CHARACTERS:
        raise InputError(f"stop strings may have {MAX_STOP_CHARACTERS} characters together", param="stop")
    if len(call.logit_bias) + len(call.banned_ids) > limits.max_logit_biases:
        raise InputError(f"logit_bias may have {limits.max_logit_biases} tokens", param="logit_bias")
    if len(call.prompts) > info.max_num_waiting:  # later is no better: no 429
        raise InputError(
            f"{len(call.prompts)} prompts are more than the queue of {info.max_num_waiting} ever takes; send fewer "
            "at once, or raise --max-num-waiting",
            param="prompt",
        )


def share_of(call: Call, limits: ServiceLimits, prompts: Sequence[EncodedPrompt]) -> int:
    """Tokens that each sample may have of what one request may; below zero where its prompts are over that.

    Raises ContextLengthError for a prompt over its own limit.
    """
    longest = limits.max_prompt_tokens
    if longest is not None and max(len(prompt.ids) for prompt in prompts) > longest:
        raise ContextLengthError(
            f"a prompt has over {longest} tokens, which is all that this server takes; shorten it", param="prompt"
        )
    left = limits.max_request_tokens - sum(len(prompt.ids) for prompt in prompts)
    return left // (len(prompts) * call.num_samples)


def check_room(engines: Sequence[EngineClient], num_prompts: int = 1) -> None:
    """Raises OverloadedError when no engine's queue has room, as far as it is known here; the engine has the last word.

    So that a refusal costs no reading, no encoding and no step of the engine.
    """
    for engine in engines:
        try:
            info, stats = engine.info, engine.stats
        except TabstopError:  # gone or loading: said where the request gets to it
            return
        num_free = max(0, info.max_num_seqs - stats.num_running)
        if stats.num_waiting + engine.num_unreported - num_free + num_prompts <= info.max_num_waiting:
            return
    raise OverloadedError("the queue is full; retry later", retry_after=1)


def limits_of(call: Call, info: EngineInfo, num_prompt_tokens: int, share: int) -> Limits:
    """When the samples of a prompt end; `share`: at most. Raises ContextLengthError, InputError."""
    room = info.max_model_len - num_prompt_tokens
    if room < 0 or (room == 0 and call.max_tokens != 0):
        raise too_long(str(num_prompt_tokens), info, "prompt")
    if call.max_tokens is not None and call.max_tokens > room:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {call.max_tokens}; together they are over "
            f"this model's context of {info.max_model_len}: shorten the prompt, or ask for at most {room}",
            param="max_tokens",
        )
    if share < (1 if call.max_tokens is None else call.max_tokens):
        raise InputError(
            "the prompts and max_tokens of all samples are over what one request may take (--max-request-tokens): "
            f"ask for at most {max(0, share)} tokens of each sample, or send several requests",
            param="max_tokens",
        )
    default = min(room, share) if call.default_max_tokens is None else min(room, share, call.default_max_tokens)
    max_tokens = default if call.max_tokens is None else call.max_tokens
    if call.min_tokens > max_tokens:
        raise InputError(f"min_tokens is {call.min_tokens}, but at most {max_tokens} may come", param="min_tokens")
    return Limits(
        max_tokens=max_tokens,
        min_tokens=call.min_tokens,
        stop_sets=() if call.ignore_eos else ("eos",),
        stop_token_ids=call.stop_token_ids,
    )


def in_time(limits: Limits, call: Call, seconds_spent: float, max_queue_age: float | None) -> Limits:
    """With what is left of the call's deadline, and how long it may wait. Raises DeadlineError."""
    deadline_ms = None if call.deadline_ms is None else call.deadline_ms - int(seconds_spent * 1000)
    if deadline_ms is not None and deadline_ms <= 0:
        raise DeadlineError("the deadline passed before the prompt was encoded")
    queue_ms = None if max_queue_age is None else math.ceil(max_queue_age * 1000)
    return structs.replace(limits, deadline_ms=deadline_ms, queue_ms=queue_ms)
