"""Prompts of an exact number of tokens: as ids where the endpoint takes them, else as text that was counted.

Knows tokens, no workloads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tabstop.bench.records import Message, Turn
from tabstop.errors import InputError

Piece = list[int] | str
FIRST_ID = 1000  # below lie special tokens and single bytes in most vocabularies
_TEXT = (
    "def class return import from self value index result items for while if else elif try except with as lambda "
    "yield async await None True False node left right parent child key name path file line text data count total "
    "size start end first last next previous open close read write parse load store send receive append remove "
    "update insert merge sort search filter map reduce join split strip replace format encode decode buffer stream "
    "token model layer batch user order price amount date time year month day hour minute second config option "
    "default error message logger test "
)
WORDS = _TEXT.split()
FILLERS = ("x", "i", "42", "_", "foo")  # short words to close a gap of a token or two


class PromptMaker(Protocol):
    """Makes prompt pieces; pieces of one maker can be joined with +."""

    def make(self, num_tokens: int, rng: np.random.Generator) -> Piece:
        """A piece of random content that is exactly so long in the server's tokens."""
        ...

    def count(self, piece: Piece) -> int | None: ...


class IdMaker:
    """Random token ids: the length is exact by construction."""

    def __init__(self, num_ids: int = 30_000) -> None:
        self.num_ids = num_ids

    def make(self, num_tokens: int, rng: np.random.Generator) -> Piece:
        low = min(FIRST_ID, self.num_ids // 2)
        return [int(i) for i in rng.integers(low, self.num_ids, num_tokens)]

    def count(self, piece: Piece) -> int | None:
        return len(piece) if isinstance(piece, list) else None


class TextMaker:
    """Text of code words, trimmed until the given counter says the wanted length.

    `num_added` is what the server adds to every text (a start token, a chat template); make() leaves room for it.
    """

    def __init__(self, counter: Callable[[str], int], num_added: int = 0) -> None:
        self.counter = counter
        self.num_added = num_added

    def make(self, num_tokens: int, rng: np.random.Generator) -> Piece:
        """Raises InputError if no text of this length is found (a tokenizer unlike any for code)."""
        target = max(1, num_tokens - self.num_added)
        words = [str(word) for word in rng.choice(WORDS, size=target)]
        words = [f"{word}_{rng.integers(1000)}" if rng.random() < 0.1 else word for word in words]
        for _ in range(60):
            text = " " + " ".join(words)
            surplus = self.counter(text) - target
            if surplus == 0:
                return text
            num_words = max(1, abs(surplus) * len(words) // (target + surplus))  # at this text's tokens per word
            if surplus > 0:
                words = words[: -num_words - int(rng.integers(2))] or ["x"]  # one more at times: breaks cycles
            else:
                words += [str(word) for word in rng.choice(WORDS if num_words > 3 else FILLERS, size=num_words)]
        raise InputError(
            f"found no text of exactly {target} tokens; give token ids (--prompt-form ids) if the server can"
        )

    def count(self, piece: Piece) -> int | None:
        return self.counter(piece) + self.num_added if isinstance(piece, str) else None


class LooseMaker:
    """Text without a tokenizer: about four characters a token, its true length only known to the server."""

    def make(self, num_tokens: int, rng: np.random.Generator) -> Piece:
        size = max(4, 4 * num_tokens)
        words = " " + " ".join(str(word) for word in rng.choice(WORDS, size=num_tokens + 8))
        return f" {rng.integers(10**8):08d}"[: max(9, size)] + words[: max(0, size - 9)]

    def count(self, piece: Piece) -> int | None:
        return None


def join(*pieces: Piece) -> Piece:
    """Pieces of one kind, end to end."""
    if all(isinstance(piece, str) for piece in pieces):
        return "".join(piece for piece in pieces if isinstance(piece, str))
    return [token for piece in pieces if isinstance(piece, list) for token in piece]


def turn_of(piece: Piece, maker: PromptMaker, **fields: object) -> Turn:
    """A turn whose prompt is this piece, with the length that the server must report."""
    values = fields | {"num_prompt_tokens": maker.count(piece)}
    content = {"ids": piece} if isinstance(piece, list) else {"text": piece}
    return Turn(**content, **values)  # type: ignore[arg-type]


def message_of(role: str, piece: Piece) -> Message:
    """Raises InputError for ids: chat endpoints take text."""
    if isinstance(piece, list):
        raise InputError("chat endpoints take text, not token ids: use --prompt-form text")
    return Message(role, piece.strip())
