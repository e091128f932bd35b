"""Constraint specs as requests name them. Knows no grammar library: compiling is the engine's (grammar/__init__.py).

Values are texts, JSON where they have structure: a deep schema is then one string on the wire, and a spec can be a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from tabstop.errors import InputError, NotSupportedError
from tabstop.types import ConstraintSpec


def json_schema_constraint(schema: dict[str, Any] | bool | str) -> ConstraintSpec:
    """JSON that a schema allows; `schema` may be its text. Raises InputError for what is no JSON."""
    return ConstraintSpec("json_schema", schema if isinstance(schema, str) else _encoded(schema, "a JSON schema"))


def json_object_constraint() -> ConstraintSpec:
    """Any JSON object."""
    return json_schema_constraint({"type": "object"})


def regex_constraint(pattern: str) -> ConstraintSpec:
    """A whole text that a regular expression matches."""
    return ConstraintSpec("regex", pattern)


def choice_constraint(choices: Sequence[str]) -> ConstraintSpec:
    """One of some texts."""
    return ConstraintSpec("choice", _encoded(list(choices), "a list of choices"))


def lark_constraint(grammar: str) -> ConstraintSpec:
    """What a Lark grammar derives from its rule `start`."""
    return ConstraintSpec("lark", grammar)


def gbnf_constraint(grammar: str) -> ConstraintSpec:
    """What a grammar in llama.cpp's GBNF derives from its rule `root`."""
    return ConstraintSpec("gbnf", grammar)


class Thinking(msgspec.Struct, frozen=True):
    """What a model writes before the text that other constraints are about: its reasoning, up to the end tag."""

    start: str
    end: str
    is_open: bool  # the start tag was in the prompt; else the model may write it, or not think at all
    start_id: int | None = None  # of a tag that is a control token
    end_id: int | None = None


def thinking_constraint(thinking: Thinking) -> ConstraintSpec:
    """No constraint by itself: the others begin behind the reasoning."""
    return ConstraintSpec("thinking", msgspec.json.encode(thinking).decode())


def read_thinking(value: Any) -> Thinking:
    """Of a spec. Raises InputError."""
    try:
        return msgspec.json.decode(value, type=Thinking)
    except (msgspec.MsgspecError, TypeError):
        raise InputError("thinking takes the tags around it as JSON") from None


def _encoded(value: Any, what: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} is not valid JSON: {error}") from None


def grammar_constraint(grammar: str) -> ConstraintSpec:
    """A grammar whose language its text tells: GBNF defines by `::=`, Lark by `:`."""
    return gbnf_constraint(grammar) if "::=" in grammar else lark_constraint(grammar)


def structured_constraint(given: Mapping[str, Any], param: str) -> ConstraintSpec | None:
    """What vLLM's StructuredOutputsParams ask for, by their names; None where it is nothing.

    Raises InputError and NotSupportedError with `param`.
    """
    refuse = [name for name in REFUSED if given.get(name)]
    if refuse:
        raise NotSupportedError(
            f"`{refuse[0]}` of `{param}` is not supported by this server; leave it out", param=param
        )
    unknown = given.keys() - FORMS.keys() - set(REFUSED) - set(IGNORED)
    if unknown:
        raise InputError(f"`{param}` has a field that it may not have; it has {', '.join(FORMS)}", param=param)
    asked = {name: value for name, value in given.items() if name in FORMS and value not in (None, False)}
    if len(asked) > 1:
        raise InputError(f"`{param}` has {' and '.join(asked)}; only one of them can be followed", param=param)
    return next((constraint_of(name, value, param) for name, value in asked.items()), None)


REFUSED = ("structural_tag", "whitespace_pattern", "disable_any_whitespace")
IGNORED = ("backend", "disable_fallback", "disable_additional_properties")
"""How another server would do it; what this one does is never less strict."""


def constraint_of(form: str, value: Any, param: str) -> ConstraintSpec:
    """One of FORMS. Raises InputError with `param`."""
    is_right, allowed, make = FORMS[form]
    if not is_right(value):
        raise InputError(f"`{param}`: {form} must be {allowed}", param=param)
    try:
        return make(value)
    except InputError as error:
        raise InputError(f"`{param}`: {error.message}", param=param) from None


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, str) for entry in value)


FORMS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any], ConstraintSpec]]] = {
    "json": (lambda value: isinstance(value, dict | bool) or _has_text(value), "a JSON schema", json_schema_constraint),
    "json_object": (lambda value: value is True, "true", lambda _: json_object_constraint()),
    "regex": (_has_text, "a regular expression", regex_constraint),
    "choice": (_is_list_of_texts, "a list of at least one text", choice_constraint),
    "grammar": (_has_text, "a grammar in Lark or GBNF", grammar_constraint),
}
"""Form → (is a value right, what is, its constraint)."""
