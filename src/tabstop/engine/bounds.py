"""What the parameters of a draw may be.

The service asks first, so that a client hears which is wrong; the engine again, since an id outside the vocabulary
would reach the device as an index.
"""

from __future__ import annotations

from collections.abc import Iterable

from tabstop.errors import InputError
from tabstop.types import MAX_LOGPROBS, Sampling

NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 1e6),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "top_k": (0, 2**31 - 1),
    "penalty_window": (0, 2**31 - 1),
}
"""Least and most of each."""

MAX_BIASES, MAX_BANNED_RUNS, MAX_RUN = 1024, 1024, 64
MAX_BIAS = 1000.0


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raises InputError naming the parameter."""
    for name, (least, most) in NUMBERS.items():
        if not least <= getattr(sampling, name) <= most:
            raise InputError(f"{name} is {getattr(sampling, name)}; it must be {least} to {most}", param=name)
    _check_count("logit_bias", len(sampling.logit_bias), MAX_BIASES)
    _check_count("bad_words", len(sampling.banned), MAX_BANNED_RUNS)
    if not all(1 <= len(run) <= MAX_RUN for run in sampling.banned):
        raise InputError(f"a bad word has more than {MAX_RUN} tokens, or none", param="bad_words")
    if not all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in sampling.logit_bias):
        raise InputError(f"a logit_bias is not between {-MAX_BIAS} and {MAX_BIAS}", param="logit_bias")
    _check_ids("logit_bias", (token_id for token_id, _ in sampling.logit_bias), vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    _check_ids("bad_words", (token_id for run in sampling.banned for token_id in run), vocab_size)
    allowed = set(sampling.allowed_token_ids).difference(run[0] for run in sampling.banned if len(run) == 1)
    if sampling.allowed_token_ids and not allowed:
        raise InputError("every one of allowed_token_ids is banned", param="allowed_token_ids")
    for name, count in (("logprobs", sampling.num_logprobs), ("prompt_logprobs", sampling.num_prompt_logprobs)):
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InputError(f"{name} is {count}; it must be 0 to {MAX_LOGPROBS}", param=name)


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise InputError(f"{name} has {count} entries; at most {most} are allowed", param=name)


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InputError(f"{name} has {token_id}; token ids are 0 to {vocab_size - 1}", param=name)
