"""What a body says of the text to come → constraint specs. Many words for one thing; at most one counts per request."""

from __future__ import annotations

from typing import Any

from tabstop.api.schema import Constrained
from tabstop.errors import InputError, NotSupportedError
from tabstop.grammar.specs import constraint_of, structured_constraint
from tabstop.types import ConstraintSpec

PLAIN = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "ebnf": "grammar",
}
"""Parameter → the form that its value is (grammar/specs.py)."""

NOTHING: tuple[Any, ...] = (None, "", [], False)


def constraint_fields(body: Constrained) -> dict[str, Any]:
    """Fields of Call. Raises InputError or NotSupportedError, naming the parameter."""
    found = _constraints(body)
    return {"constraints": tuple(found.values()), "constraint_param": next(iter(found), None)}


def _constraints(body: Constrained) -> dict[str, ConstraintSpec]:
    """At most one, by the parameter that asks for it."""
    found = {
        name: constraint_of(form, value, name)
        for name, form in PLAIN.items()
        if (value := getattr(body, name)) not in NOTHING
    }
    if (spec := _response_format(body.response_format)) is not None:
        found["response_format"] = spec
    if (spec := _structured_outputs(body.structured_outputs)) is not None:
        found["structured_outputs"] = spec
    if len(found) > 1:
        first, second, *_ = found
        raise InputError(f"`{first}` and `{second}`: only one of them can be followed", param=second)
    return found


def _response_format(given: Any) -> ConstraintSpec | None:
    """OpenAI's; a json_object may have a `schema` beside it, as llama.cpp takes it."""
    param = "response_format"
    if given in NOTHING or given == {}:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = given.get("schema")
        return constraint_of("json_object", True, param) if schema is None else constraint_of("json", schema, param)
    if kind == "json_schema":
        described = given.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else given.get("schema")
        if schema is None:
            raise InputError('`response_format`: give the schema as {"json_schema": {"schema": …}}', param=param)
        return constraint_of("json", schema, param)
    if kind == "structural_tag":
        raise NotSupportedError("`response_format`: structural_tag is not supported by this server", param=param)
    raise InputError("`response_format`: its type must be text, json_object or json_schema", param=param)


def _structured_outputs(given: Any) -> ConstraintSpec | None:
    param = "structured_outputs"
    if given in NOTHING:
        return None
    if not isinstance(given, dict):
        raise InputError("`structured_outputs` must be an object", param=param)
    return structured_constraint(given, param)
