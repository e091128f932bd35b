"""A vocabulary by its bytes: which tokens continue, and which make up, a piece of text. Knows bytes and ids only.

The trie is a sorted array: all tokens with a common beginning lie side by side, so a node is a range of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


class TokenTrie:
    """Immutable. Tokens without bytes (control tokens, padding) are in no node."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """`token_bytes`: what each id adds to a text."""
        entries = sorted((spelled, token_id) for token_id, spelled in enumerate(token_bytes) if spelled)
        self._keys = [spelled for spelled, _ in entries]
        self._ids = np.array([token_id for _, token_id in entries], dtype=np.int64)

    def extending(self, start: bytes) -> np.ndarray:
        """Ids of the tokens that begin with `start`, itself included; int64."""
        end = _after(start)
        return self._ids[
            bisect_left(self._keys, start) : len(self._keys) if end is None else bisect_left(self._keys, end)
        ]

    def is_extended(self, start: bytes) -> bool:
        """Whether a longer token begins with `start`."""
        at = bisect_left(self._keys, start + b"\0")
        return at < len(self._keys) and self._keys[at].startswith(start)

    def spelling(self, piece: bytes) -> np.ndarray:
        """Ids of the tokens that are exactly `piece`; int64."""
        low = bisect_left(self._keys, piece)
        return self._ids[low : bisect_left(self._keys, piece + b"\0")]


def _after(start: bytes) -> bytes | None:
    """The smallest bytes that sort behind everything that begins with `start`; None: nothing does."""
    trimmed = start.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else None
