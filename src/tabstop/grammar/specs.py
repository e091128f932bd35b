"""Constraint specs as requests name them. Knows no grammar library: compiling is the engine's (grammar/__init__.py).

Values are texts, JSON where they have structure: a deep schema is then one string on the wire, and a spec can be a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tabstop.errors import InputError
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


def _encoded(value: Any, what: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} is not valid JSON: {error}") from None
