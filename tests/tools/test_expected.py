"""Values in the types that schemas expect, whole and as JSON that streams."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.tools import Function, ToolUse
from tabstop.tools.expected import expected_of
from tests.tools.reading import cut_at, hear, made

DEFS = {
    "$defs": {"n": {"type": "integer"}, "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/n"}]}},
    "type": "object",
    "properties": {
        "ref": {"$ref": "#/$defs/n"},
        "loop": {"$ref": "#/$defs/loop"},
        "lost": {"$ref": "#/$defs/nowhere"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "text or number": {"type": ["string", "number"]},
        "all": {"allOf": [{"description": "x"}, {"$ref": "#/$defs/n"}]},
        "typed": {
            "type": "object",
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
            "properties": {"a": {"type": "integer"}},
        },
        "enum": {"enum": [1, 2, None]},
        "text enum": {"enum": ["1", "2"]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/n"}},
        "anything": {},
        "true": True,
        "text": {"type": "string"},
        "number": {"type": "number"},
        "yes": {"type": "boolean"},
    },
    "additionalProperties": {"type": "integer"},
}

CASES = [
    ("ref", "5", 5),
    ("ref", 5.0, 5),
    ("ref", "5.0", 5),
    ("ref", 5.5, 5.5),
    ("ref", "five", "five"),
    ("ref", True, True),
    ("ref", " 5\n", 5),
    ("loop", "5", 5),
    ("lost", "5", "5"),
    ("either", "null", None),
    ("either", "None", None),
    ("either", "7", 7),
    ("text or number", "7", "7"),
    ("all", "7", 7),
    ("typed", '{"a": "1"}', {"a": 1}),
    ("typed", {"a": "1"}, {"a": 1}),
    ("enum", "2", 2),
    ("text enum", 2, "2"),
    ("list", ["1", 2.0, "x"], [1, 2, "x"]),
    ("list", '["1"]', [1]),
    ("anything", "5", "5"),
    ("true", "5", "5"),
    ("text", 5, "5"),
    ("text", 5.5, "5.5"),
    ("text", True, "true"),
    ("text", None, None),
    ("text", {"a": [1]}, '{"a": [1]}'),
    ("number", "1e3", 1000.0),
    ("number", "1e999", "1e999"),
    ("number", "NaN", "NaN"),
    ("number", "9" * 5000, "9" * 5000),
    ("yes", "true", True),
    ("yes", "False", False),
    ("yes", "yes", "yes"),
    ("yes", 1, 1),
    ("other", "5", 5),
]


@pytest.mark.parametrize(("key", "value", "wanted"), CASES)
def test_values_in_their_types(key: str, value: Any, wanted: Any) -> None:
    found = expected_of(DEFS).coerced({key: value})[key]
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(("key", "value", "wanted"), CASES)
@pytest.mark.parametrize("first", ["arguments", "name"])
def test_streams_in_the_same_types(key: str, value: Any, wanted: Any, first: str) -> None:
    use = ToolUse((Function("f", DEFS),))
    fields = [f'"arguments": {json.dumps({key: value})}', '"name": "f"']
    text = "<tool_call>{" + ", ".join(fields if first == "arguments" else fields[::-1]) + "}</tool_call>"
    for pieces in ([text], list(text)):
        ((_, arguments),) = hear(made("hermes"), pieces, use).good
        assert json.loads(arguments) == {key: wanted} and type(json.loads(arguments)[key]) is type(wanted)


@pytest.mark.parametrize(("key", "value", "wanted"), [case for case in CASES if isinstance(case[1], str)])
def test_bare_text_gets_the_same_types(key: str, value: str, wanted: Any) -> None:
    use = ToolUse((Function("f", DEFS),))
    text = f"<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>"
    for pieces in ([text], list(text)):
        ((_, arguments),) = hear(made("qwen3_coder"), pieces, use).good
        assert json.loads(arguments) == {key: wanted}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {},
            True,
            False,
            5,
            *({"type": kind} for kind in ("string", "integer", "number", "boolean", "null", "array", "object")),
        ]
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, max_size=2)}),
        st.dictionaries(st.text(max_size=2), inner, max_size=2).map(lambda found: {"properties": found}),
        inner.map(lambda found: {"type": ["object", "string"], "additionalProperties": found}),
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    SCHEMAS,
    st.booleans(),
    st.lists(st.integers(0, 999), max_size=5),
)
@settings(max_examples=250, deadline=None)
def test_any_json_under_any_schema(value: dict[str, Any], schema: Any, ascii: bool, places: list[int]) -> None:
    """Streamed is as whole; without a schema it is what was written."""
    written = json.dumps(value, ensure_ascii=ascii)
    text = f"[TOOL_CALLS]f[ARGS]{written}"
    schema = schema if isinstance(schema, dict) else None
    use = ToolUse((Function("f", schema),))
    whole = hear(made("mistral"), [text], use)
    assert hear(made("mistral"), cut_at(text, places), use) == whole
    ((_, arguments),) = whole.good
    assert json.loads(arguments) == expected_of(schema).coerced(json.loads(written))
    if schema is None:
        assert json.loads(arguments) == value


def test_half_a_character_can_be_sent() -> None:
    use = ToolUse((Function("f", {"properties": {"n": {"type": "integer"}}}),))
    ((_, arguments),) = hear(
        made("hermes"), ['<tool_call>{"name": "f", "arguments": {"n": "\\ud800", "s": "\\ud800"}}'], use
    ).good
    assert arguments.encode() and json.loads(arguments) == {"n": "\ud800", "s": "\ud800"}


def test_deep_values_are_no_arguments() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": ' + "[" * 10_000 + "]" * 10_000 + "}}"
    heard = hear(made("hermes"), [text])
    assert (heard.good, heard.content) == ([], text)
    deep = '<tool_call>{"name": "get_weather", "arguments": {"days": "' + "[" * 10_000 + '"}}'
    assert json.loads(hear(made("hermes"), [deep]).good[0][1]) == {"days": "[" * 10_000}
