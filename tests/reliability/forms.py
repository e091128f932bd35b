"""Forms of fields that /openapi.json leaves open: grammars, schemas, tools, choices.

Schemathesis reduces "anything" to nothing: a property without a form is never drawn by its name. So what is open gets
the forms that its field is made for, and fields that no form is known of get any text, number or object.
"""

from __future__ import annotations

import copy
from typing import Any

SCHEMAS = "#/components/schemas/"
SAID = {"default", "description", "title"}
"""Keywords that allow everything."""

TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
SWITCH = {"type": "boolean"}
UNKNOWN = {"anyOf": [TEXT, {"type": "number"}, {"type": "object"}]}
SCHEMA = {"$ref": f"{SCHEMAS}FuzzedSchema"}
KINDS = ["object", "array", "string", "integer", "number", "boolean", "null"]


def record(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


FUZZED_SCHEMA = record(
    type={"enum": KINDS},
    properties={"type": "object", "additionalProperties": SCHEMA},
    required=TEXTS,
    additionalProperties=SWITCH,
    items=SCHEMA,
    anyOf={"type": "array", "items": SCHEMA},
    enum=TEXTS,
    pattern=TEXT,
    maxLength={"type": "integer"},
    minimum={"type": "number"},
    multipleOf={"type": "number"},
)
"""A JSON schema, more or less."""

SCHEMA_OR_TEXT = {"anyOf": [SCHEMA, TEXT]}
FUNCTION = record(name=TEXT, description=TEXT, parameters=SCHEMA, strict=SWITCH)
NAMED = record(type={"const": "function"}, function=record(name=TEXT))
KIND_OF_ANSWER = {"enum": ["text", "json_object", "json_schema", "structural_tag"]}
FORMS: dict[str, dict[str, Any]] = {
    "response_format": record(type=KIND_OF_ANSWER, json_schema=record(name=TEXT, schema=SCHEMA, strict=SWITCH)),
    "structured_outputs": record(json=SCHEMA_OR_TEXT, regex=TEXT, choice=TEXTS, grammar=TEXT, json_object=SWITCH),
    "guided_json": SCHEMA_OR_TEXT,
    "json_schema": SCHEMA_OR_TEXT,
    "guided_choice": TEXTS,
    "guided_json_object": SWITCH,
    **dict.fromkeys(("guided_regex", "regex", "guided_grammar", "grammar", "ebnf"), TEXT),
    "tools": {"type": "array", "items": record(type={"const": "function"}, function=FUNCTION)},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, NAMED]},
    "chat_template_kwargs": {"type": "object", "additionalProperties": {"anyOf": [SWITCH, TEXT]}},
}


def with_forms(description: dict[str, Any], required: str | None = None) -> dict[str, Any]:
    """The description, its open fields narrowed to what they are made for; where a form was told, both are allowed.

    `required`: a field that must be there wherever it may be.
    """
    narrowed = copy.deepcopy(description)
    schemas = narrowed["components"]["schemas"]
    for schema in schemas.values():
        properties = schema.get("properties", {})
        for name, told in properties.items():
            if set(told) <= SAID:
                properties[name] = FORMS.get(name, UNKNOWN)
            elif name in FORMS:
                properties[name] = {"anyOf": [told, FORMS[name]]}
    for name in [name for name, schema in schemas.items() if required in schema.get("properties", {})]:
        _require(schemas[name], str(required))
        for schema in schemas.values():
            for field, told in list(schema.get("properties", {}).items()):
                if (branch := _branch(told, SCHEMAS + name)) is not None:
                    schema["properties"][field] = branch
                    _require(schema, field)
    schemas["FuzzedSchema"] = FUZZED_SCHEMA
    return narrowed


def _require(schema: dict[str, Any], name: str) -> None:
    schema["required"] = sorted({*schema.get("required", ()), name})


def _branch(told: dict[str, Any], reference: str) -> dict[str, Any] | None:
    """What of a field's schema holds an object of that kind, alone or in a list that is not empty."""
    for branch in told.get("anyOf", [told]):
        if branch == {"$ref": reference}:
            return dict(branch)
        if branch.get("items") == {"$ref": reference}:
            return branch | {"minItems": 1}
    return None
