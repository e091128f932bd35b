"""Constraints: which tokens may come next. The protocol and the registry.

A request holds a list of constraints (token healing and a schema, say); their masks are ANDed. They are compiled off
the engine's loop while the request waits. A new kind is one file and one line in KINDS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tabstop.errors import InputError
from tabstop.grammar.specs import Thinking, read_thinking
from tabstop.types import ConstraintSpec

if TYPE_CHECKING:
    from tabstop.grammar.guidance import Guidance
    from tabstop.grammar.trie import TokenTrie

NO_IDS = np.empty(0, np.int64)


class Constraint(Protocol):
    """State over the tokens accepted so far. Belongs to one sample, used by one thread at a time.

    Each method but the properties may raise: an InputError tells the client why its request ends.
    """

    def fill(self, mask: np.ndarray, ends: np.ndarray) -> None:
        """Clears the bits of forbidden tokens in `mask`, laid out as in engine/plan.py:LateInputs.

        `ends`: int64, the tokens that would end the sample now. They are never accepted.
        """
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

    @property
    def ended(self) -> bool:
        """True once nothing may follow: the sample is complete."""
        ...

    def fork(self) -> Constraint:
        """An independent copy in the same state, for another sample of the request."""
        ...


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What compiling and following a client's grammar may cost; config.py has the options."""

    max_bytes: int = 64 << 10
    max_depth: int = 64
    compile_seconds: float = 5.0
    mask_seconds: float = 0.1
    num_cached: int = 128


class Vocabulary:
    """What constraints may know of the tokens, one object an engine; what takes time to make is made at first use."""

    def __init__(
        self,
        size: int,
        load: Callable[[], Sequence[bytes]] = tuple,
        *,
        control: Callable[[], Mapping[int, bytes]] = dict,
        encode: Callable[[str], Sequence[int]] = lambda text: (),
        limits: GrammarLimits = GrammarLimits(),
    ) -> None:
        """`size`: ids of the model. `load`: gives what each id adds to a text; may know fewer ids.

        `control`: gives the names of the ids that add nothing. `encode`: how a text inside another is best spelled;
        what does not spell it is not used.
        """
        self.size = size
        self.limits = limits
        self.encode = encode
        self._load = load
        self._control = control

    @cached_property
    def token_bytes(self) -> Sequence[bytes]:
        known = list(self._load())[: self.size]
        return known + [b""] * (self.size - len(known))

    @cached_property
    def control_bytes(self) -> Mapping[int, bytes]:
        return {token_id: name for token_id, name in self._control().items() if token_id < self.size}

    @cached_property
    def trie(self) -> TokenTrie:
        from tabstop.grammar.trie import TokenTrie

        return TokenTrie(self.token_bytes)

    @cached_property
    def guidance(self) -> Guidance:
        """What the kinds of guidance.py share."""
        from tabstop.grammar.guidance import Guidance

        return Guidance(self)


Before = bytes | Thinking
"""What comes before the text that a constraint is about: healed bytes, or reasoning."""

Compile = Callable[[Any, Vocabulary, Before], Constraint]
"""(spec value, vocabulary, what comes before what the constraint is about) → Constraint.

Raises InputError for a value that cannot be compiled.
"""

KINDS: dict[str, str | Compile] = {
    "healing": "tabstop.grammar.healing:compile_healing",
    "tokens": "tabstop.grammar.tokens:compile_tokens",
    "json_schema": "tabstop.grammar.guidance:compile_json_schema",
    "regex": "tabstop.grammar.guidance:compile_regex",
    "choice": "tabstop.grammar.guidance:compile_choice",
    "lark": "tabstop.grammar.guidance:compile_lark",
    "gbnf": "tabstop.grammar.guidance:compile_gbnf",
    "tool_calls": "tabstop.grammar.tool_calls:compile_tool_calls",
}
"""Kind → compile function, or module:function to import when first used."""


def compile_constraint(spec: ConstraintSpec, vocabulary: Vocabulary, before: Before = b"") -> Constraint:
    """Compiles one constraint; runs on a helper thread. Raises InputError for an unknown kind or a bad value."""
    entry = KINDS.get(spec.kind)
    if entry is None:
        raise InputError(f"unknown constraint kind {spec.kind!r}; known: {', '.join(sorted(KINDS)) or 'none'}")
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(import_module(module), name)
    assert callable(entry)
    return entry(spec.value, vocabulary, before)


def compile_constraints(specs: Sequence[ConstraintSpec], vocabulary: Vocabulary) -> list[Constraint]:
    """All of a request's. Healed bytes stand before the text that the others are about: a token may lie across.

    So does reasoning; a prompt that is healed is no chat, which alone has some.
    """
    values = {spec.kind: spec.value for spec in specs}
    constraints = [compile_constraint(spec, vocabulary) for spec in specs if spec.kind == "healing"]
    before: Before = bytes.fromhex(values["healing"]) if constraints else b""
    if "thinking" in values:
        before = read_thinking(values["thinking"])
    others = [spec for spec in specs if spec.kind not in ("healing", "thinking")]
    return constraints + [compile_constraint(spec, vocabulary, before) for spec in others]
