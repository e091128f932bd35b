"""Token healing: the answer's first tokens must spell given bytes, and may go on within the last of them.

The front end took back tokens from the end of a prompt (text/healing.py); here is what makes the model write their
bytes again, in whichever tokens it likes. A token that would lead where no other can follow is not allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tabstop.errors import InputError
from tabstop.grammar import Before, Vocabulary
from tabstop.grammar.bits import mask_of
from tabstop.grammar.trie import TokenTrie

MAX_BYTES = 4096


class Healing:
    """A Constraint (grammar/__init__.py): where in the bytes the tokens have come."""

    def __init__(self, vocabulary: Vocabulary, target: bytes, masks: list[np.ndarray], places: list[int]) -> None:
        """`masks`: the allowed tokens at each byte; `places`: where each accepted token led, 0 first."""
        self._vocabulary = vocabulary
        self._target = target
        self._masks = masks
        self._places = places

    def fill(self, mask: np.ndarray, ends: np.ndarray) -> None:
        if not self.released:
            mask &= self._masks[self._places[-1]]

    def accept(self, token_id: int) -> None:
        self._places.append(self._places[-1] + len(self._vocabulary.token_bytes[token_id]))

    def rollback(self, num_tokens: int) -> None:
        del self._places[len(self._places) - num_tokens :]

    @property
    def released(self) -> bool:
        return self._places[-1] >= len(self._target)

    @property
    def ended(self) -> bool:
        return False

    def fork(self) -> Healing:
        return Healing(self._vocabulary, self._target, self._masks, self._places[:])


def compile_healing(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Healing:
    """`value`: the bytes in hexadecimal. Raises InputError for bytes that the vocabulary cannot spell."""
    try:
        target = bytes.fromhex(value)
    except (TypeError, ValueError):
        raise InputError("healing takes bytes in hexadecimal") from None
    if len(target) > MAX_BYTES:
        raise InputError(f"at most {MAX_BYTES} bytes can be healed")
    allowed = allowed_tokens(vocabulary.trie, target)
    if target and not allowed[0].size:
        raise InputError("the vocabulary cannot spell the bytes to heal")
    return Healing(vocabulary, target, [mask_of(ids, vocabulary.size) for ids in allowed], [0])


def allowed_tokens(trie: TokenTrie, target: bytes) -> list[np.ndarray]:
    """For each place in the target, the tokens after which the rest can still be spelled; int64 each."""
    allowed: list[np.ndarray] = [np.empty(0, np.int64)] * len(target)
    for place in reversed(range(len(target))):
        ids = [trie.extending(target[place:])]
        ids += [trie.spelling(target[place:end]) for end in range(place + 1, len(target)) if allowed[end].size]
        allowed[place] = np.concatenate(ids)
    return allowed
