"""Allowed and banned token ids as a constraint: beside a grammar, so that a mask shows when nothing is left.

The sampler (sampling/steps.py) follows the same lists; without a grammar it does so alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tabstop.grammar import Before, Vocabulary
from tabstop.grammar.bits import mask_of
from tabstop.types import ConstraintSpec, Sampling


def tokens_constraint(sampling: Sampling) -> ConstraintSpec | None:
    """What a request's sampling says of tokens, as a constraint; None where it says nothing."""
    if not (sampling.allowed_token_ids or sampling.banned):
        return None
    return ConstraintSpec("tokens", (sampling.allowed_token_ids, sampling.banned))


class TokenRules:
    """A Constraint (grammar/__init__.py). Knows the output so far, for runs of several tokens."""

    def __init__(self, mask: np.ndarray, runs: Sequence[Sequence[int]], tokens: list[int]) -> None:
        """`mask`: what is ever allowed. `runs`: which the output never has."""
        self._mask = mask
        self._runs = runs
        self._tokens = tokens

    def fill(self, mask: np.ndarray, ends: np.ndarray) -> None:
        mask &= self._mask
        for *start, last in self._runs:
            if self._tokens[-len(start) :] == start:
                mask[last // 32] &= ~(np.uint32(1) << np.uint32(last % 32)).view(np.int32)

    def accept(self, token_id: int) -> None:
        self._tokens.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        del self._tokens[len(self._tokens) - num_tokens :]

    @property
    def released(self) -> bool:
        return False

    @property
    def ended(self) -> bool:
        return False

    def fork(self) -> TokenRules:
        return TokenRules(self._mask, self._runs, self._tokens[:])


def compile_tokens(value: Any, vocabulary: Vocabulary, before: Before = b"") -> TokenRules:
    """`value`: (allowed ids, empty for all; banned runs), whose ids the engine has checked."""
    allowed, banned = value
    size = vocabulary.size
    mask = mask_of(np.array(allowed, np.int64) if allowed else np.arange(size), size)
    singles = [run[0] for run in banned if len(run) == 1]
    mask &= ~mask_of(np.array(singles, np.int64), size)
    return TokenRules(mask, [run for run in banned if len(run) > 1], [])
