"""Constraints: which tokens may come next. The protocol and the registry.

A request holds a list of constraints (token healing and a schema, say); their masks are ANDed. They are compiled off
the engine's loop while the request waits. A new kind is one file and one line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from tabstop.errors import InputError
from tabstop.types import ConstraintSpec


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


Compile = Callable[[Any, int], Constraint]
"""(spec value, vocab_size) → Constraint. Raises InputError for a value that cannot be compiled."""

KINDS: dict[str, str | Compile] = {}
"""Kind → compile function, or module:function to import when first used."""


def compile_constraint(spec: ConstraintSpec, vocab_size: int) -> Constraint:
    """Compiles one constraint; runs on a helper thread. Raises InputError for an unknown kind or a bad value."""
    entry = KINDS.get(spec.kind)
    if entry is None:
        raise InputError(f"unknown constraint kind {spec.kind!r}; known: {', '.join(sorted(KINDS)) or 'none'}")
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(import_module(module), name)
    assert callable(entry)
    return entry(spec.value, vocab_size)
