"""Constraints: which tokens may come next. The protocol and the registry.

A request holds a list of constraints (token healing and a schema, say); their masks are ANDed. They are compiled off
the engine's loop while the request waits. A new kind is one file and one line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tabstop.errors import InputError
from tabstop.types import ConstraintSpec

if TYPE_CHECKING:
    from tabstop.grammar.trie import TokenTrie


class Constraint(Protocol):
    """State over the tokens accepted so far. Single-threaded; belongs to one sample."""

    def fill(self, mask: np.ndarray) -> None:
        """Clears the bits of forbidden tokens in `mask`, laid out as in engine/plan.py:LateInputs."""
        ...

    def accept(self, token_id: int) -> None:
        """Advances by one token that the mask allowed."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Takes the last accepted tokens back (rejected drafts)."""
        ...

    @property
    def released(self) -> bool:
        """True once it allows every token for ever; it is then dropped."""
        ...

    def fork(self) -> Constraint:
        """An independent copy in the same state, for another sample of the request."""
        ...


class Vocabulary:
    """What constraints may know of the tokens, one object an engine; what takes time to make is made at first use."""

    def __init__(self, size: int, load: Callable[[], Sequence[bytes]] = tuple) -> None:
        """`size`: ids of the model. `load`: gives what each id adds to a text; may know fewer ids."""
        self.size = size
        self._load = load

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        known = list(self._load())[: self.size]
        return known + [b""] * (self.size - len(known))

    @cached_property
    def trie(self) -> TokenTrie:
        from tabstop.grammar.trie import TokenTrie

        return TokenTrie(self.token_bytes)


Compile = Callable[[Any, Vocabulary], Constraint]
"""(spec value, vocabulary) → Constraint. Raises InputError for a value that cannot be compiled."""

KINDS: dict[str, str | Compile] = {"healing": "tabstop.grammar.healing:compile_healing"}
"""Kind → compile function, or module:function to import when first used."""


def compile_constraint(spec: ConstraintSpec, vocabulary: Vocabulary) -> Constraint:
    """Compiles one constraint; runs on a helper thread. Raises InputError for an unknown kind or a bad value."""
    entry = KINDS.get(spec.kind)
    if entry is None:
        raise InputError(f"unknown constraint kind {spec.kind!r}; known: {', '.join(sorted(KINDS)) or 'none'}")
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(import_module(module), name)
    assert callable(entry)
    return entry(spec.value, vocabulary)
