"""The words for one thing: what each dialect says of the text to come reaches the call as the same spec."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tabstop.api.dialects.llamacpp import LlamaCompletionBody, llama_completion_call
from tabstop.api.dialects.openai import ChatBody, CompletionBody, chat_call, completion_call
from tabstop.api.fields import Caller
from tabstop.api.schema import decode_body
from tabstop.errors import InputError, NotSupportedError
from tabstop.grammar.specs import (
    choice_constraint,
    gbnf_constraint,
    json_object_constraint,
    json_schema_constraint,
    lark_constraint,
    regex_constraint,
)
from tabstop.types import ConstraintSpec

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"const": "ü"}}}
TEXT = json.dumps(SCHEMA)
AS_SCHEMA, AS_OBJECT = json_schema_constraint(SCHEMA), json_object_constraint()


def constraints(**fields: Any) -> tuple[ConstraintSpec, ...]:
    """Of a completion, which a chat and llama.cpp's completion must agree with."""
    caller = Caller()
    body = json.dumps({"prompt": "x"} | fields).encode()
    found = completion_call(decode_body(body, CompletionBody), caller).constraints
    assert llama_completion_call(decode_body(body, LlamaCompletionBody), caller).constraints == found
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]} | fields).encode()
    assert chat_call(decode_body(body, ChatBody), caller).constraints == found
    return found


@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({"response_format": {"type": "json_object"}}, AS_OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, AS_SCHEMA),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            AS_SCHEMA,
        ),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, AS_SCHEMA),
        ({"guided_json": SCHEMA}, AS_SCHEMA),
        ({"guided_json": {}}, json_schema_constraint({})),
        ({"json_schema": SCHEMA}, AS_SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
        ({"guided_json": TEXT}, ConstraintSpec("json_schema", TEXT)),
        ({"structured_outputs": {"json": TEXT, "backend": "any"}}, ConstraintSpec("json_schema", TEXT)),
        ({"structured_outputs": {"json_object": True, "json": None}}, AS_OBJECT),
        ({"guided_json_object": True}, AS_OBJECT),
        ({"guided_regex": "[a-z]+"}, regex_constraint("[a-z]+")),
        ({"regex": "[a-z]+"}, regex_constraint("[a-z]+")),
        ({"structured_outputs": {"regex": "[a-z]+"}}, regex_constraint("[a-z]+")),
        ({"guided_choice": ["ü", "b"]}, choice_constraint(["ü", "b"])),
        ({"structured_outputs": {"choice": ["ü", "b"]}}, choice_constraint(["ü", "b"])),
        ({"guided_grammar": 'start: "x"'}, lark_constraint('start: "x"')),
        ({"structured_outputs": {"grammar": 'start: "x"'}}, lark_constraint('start: "x"')),
        ({"grammar": 'root ::= "x"'}, gbnf_constraint('root ::= "x"')),
        ({"guided_grammar": 'root ::= "x"'}, gbnf_constraint('root ::= "x"')),
        ({"ebnf": 'root ::= "x"'}, gbnf_constraint('root ::= "x"')),
    ],
)
def test_every_spelling(fields: dict[str, Any], spec: ConstraintSpec) -> None:
    assert constraints(**fields) == (spec,)


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    assert list(json.loads(constraints(guided_json=SCHEMA)[0].value)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    "fields",
    [
        *({"response_format": value} for value in (None, {}, {"type": "text"}, "")),
        *({"structured_outputs": value} for value in (None, {}, {"json_object": False}, {"regex": None})),
        {"guided_json": None, "guided_choice": [], "guided_regex": "", "guided_json_object": False, "grammar": ""},
    ],
)
def test_what_asks_for_nothing(fields: dict[str, Any]) -> None:
    assert constraints(**fields) == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
        ({"response_format": {"type": ["json_object"]}}, "response_format"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"guided_regex": {"x": 1}}, "guided_regex"),
        ({"grammar": {"type": "json"}}, "grammar"),
        ({"structured_outputs": "x"}, "structured_outputs"),
        ({"structured_outputs": {"yaml": 1}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "grammar": "x"}, "response_format"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        constraints(**fields)
    assert caught.value.param == param and param in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"structural_tag": "{}"}},
        {"response_format": {"type": "structural_tag", "structures": []}},
        {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
    ],
)
def test_what_this_server_does_not_have(fields: dict[str, Any]) -> None:
    with pytest.raises(NotSupportedError):
        constraints(**fields)
