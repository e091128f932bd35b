"""Where to take a prompt back to, so that its last tokens are those that the whole text would have had.

A cursor is in the middle of a token whenever the vocabulary has a token that begins before it and goes on after it. The
prompt is then cut at the first such token, and what was cut becomes the beginning that the answer must have
(grammar/healing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabstop.grammar.trie import TokenTrie

MAX_DEPTH = 8
"""Tokens that are taken back at most."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A prompt's stable part, and what came after it."""

    ids: list[int]
    removed: bytes = b""
    num_removed: int = 0


class Healer:
    """Cuts prompts of one vocabulary. Immutable."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._trie = TokenTrie(token_bytes)

    def cut(self, ids: list[int], *, keep: int = 0) -> Cut:
        """The ids before the earliest token that may go on differently; at least `keep` of them stay.

        Control tokens end the search: nothing goes on over them.
        """
        tail, best = b"", Cut(ids)
        for depth in range(1, min(MAX_DEPTH, len(ids) - keep) + 1):
            spelled = self._bytes(ids[-depth])
            if not spelled:
                break
            tail = spelled + tail
            if self._trie.is_extended(tail):
                best = Cut(ids[:-depth], tail, depth)
        return best

    def _bytes(self, token_id: int) -> bytes:
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""
