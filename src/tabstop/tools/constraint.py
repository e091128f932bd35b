"""What must be called → a constraint: the format's spelling as a grammar, with the functions' schemas for arguments.

Knows no grammar library (grammar/tool_calls.py compiles it): Lark as llguidance reads it; @name is another grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tabstop.errors import InputError
from tabstop.tools import NAME, CallSyntax, Function, ToolFormat, ToolUse
from tabstop.tools.expected import Expected, expected_of
from tabstop.types import ConstraintSpec

ANY_OBJECT: dict[str, Any] = {"type": "object"}

MAX_COUNTED = 1000
"""Characters of a bare text that a grammar counts; longer ones may be of any length."""

ANNOTATIONS = ("title", "description", "examples", "default", "$comment")
VALUES = ("const", "enum")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that allow and forbid nothing; that hold values; that hold schemas by names, which are no keywords."""

DEFINITIONS = ("$defs", "definitions")


def calls_constraint(
    form: ToolFormat, use: ToolUse, control: Mapping[str, int], content: ConstraintSpec | None = None
) -> ConstraintSpec:
    """A call, or several where these are allowed; with `content`, a JSON schema, that instead is right as well.

    `control`: the vocabulary's control tokens, which a grammar names by their ids. Raises InputError.
    """
    grammar = _Grammar(form, control)
    one = " | ".join(grammar.call(at, function) for at, function in enumerate(use.functions))
    syntax = form.syntax
    more = f"({grammar.text(syntax.separator)} one)*" if use.is_parallel and syntax.separator is not None else ""
    rules = [f"calls: {grammar.text(syntax.opening)} one {more} {grammar.text(syntax.closing)}", f"one: {one}"]
    start = "start: calls"
    if content is not None:
        start += " | @content"
        grammar.schemas["content"] = (_schema_of(content), True)
    lark = "\n".join([start, *rules, *grammar.rules])
    try:
        schemas = {
            name: {"schema": _bare(schema), "strict": strict} for name, (schema, strict) in grammar.schemas.items()
        }
        return ConstraintSpec("tool_calls", json.dumps({"grammar": lark, "schemas": schemas}))
    except RecursionError:
        raise InputError("the tools' parameters are nested too deeply", param="tools") from None


def _bare(node: Any) -> Any:
    """A schema without what only readers need: most of the length of an agent's tools."""
    if isinstance(node, list):
        return [_bare(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    return {
        key: {name: _bare(inner) for name, inner in value.items()}
        if key in NAMED_SCHEMAS and isinstance(value, dict)
        else value
        if key in VALUES
        else _bare(value)
        for key, value in node.items()
        if key not in ANNOTATIONS
    }


def _schema_of(content: ConstraintSpec) -> Any:
    try:
        return json.loads(content.value)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is not valid JSON: {error}") from None


class _Grammar:
    """Rules and schemas that the calls need."""

    def __init__(self, form: ToolFormat, control: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self.schemas: dict[str, tuple[Any, bool]] = {}  # and whether it is followed strictly
        self._syntax: CallSyntax = form.syntax
        self._markers = {marker: control[marker] for marker in form.markers if marker in control}

    def text(self, text: str) -> str:
        """A text that must come; "" for nothing."""
        if not text:
            return ""
        names = "|".join(map(re.escape, self._markers)) or "(?!)"
        parts = (part for part in re.split(f"({names})", text) if part)
        return " ".join(f"<[{self._markers[part]}]>" if part in self._markers else _quoted(part) for part in parts)

    def call(self, at: int, function: Function) -> str:
        """The name of a rule for one call."""
        name, schema = f"call{at}", dict(function.parameters or ANY_OBJECT)
        if self._syntax.arguments == "json":
            self.schemas[f"arguments{at}"] = (
                schema if "$ref" in schema else schema | ANY_OBJECT,
                function.strict,
            )
            arguments = f"@arguments{at}"
        else:
            arguments = self._parameters(at, schema, function.strict)
        before, after = self._syntax.before.replace(NAME, function.name), self._syntax.after
        self.rules.append(f"{name}: {self.text(before)} {arguments} {self.text(after)}")
        return name

    def _parameters(self, at: int, schema: dict[str, Any], strict: bool) -> str:
        """Of Qwen3-Coder: the properties in their order, a tag each; what is not required may be left out."""
        expected, properties = expected_of(schema), schema.get("properties")
        required = schema.get("required")
        items = []
        for number, key in enumerate(properties if isinstance(properties, Mapping) else ()):
            name = f"p{at}x{number}"
            value = self._value(name, key, expected.property(key), (schema, strict))
            self.rules.append(f"{name}: {_quoted(f'<parameter={key}>' + chr(10))} {value}")
            items.append(name if isinstance(required, Sequence) and key in required else f"{name}?")
        return " ".join(items)

    def _value(self, name: str, key: str, expected: Expected, whole: tuple[dict[str, Any], bool]) -> str:
        """A value and the end of its tag."""
        schema, strict = whole
        end = "\n</parameter>\n"
        own = schema["properties"][key]
        texts = own.get("enum") if isinstance(own, Mapping) else None
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return f"({' | '.join(map(_quoted, texts))}) {_quoted(end)}"
        if expected.allows("string"):
            most = own.get("maxLength") if isinstance(own, Mapping) else None
            count = f"{{0,{most}}}" if isinstance(most, int) and most <= MAX_COUNTED else "*"
            self.rules.append(f"{name}t[suffix={_quoted(end)}]: /(?s:.{count})/")
            return f"{name}t"
        inner = dict(own) | {key: schema[key] for key in DEFINITIONS if key in schema}
        self.schemas[f"{name}v"] = (inner, strict)
        return f"@{name}v {_quoted(end)}"


def _quoted(text: str) -> str:
    """A text as a string of a Lark grammar. Raises InputError for what is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("a function's parameters are not valid Unicode", param="tools") from None
    return json.dumps(text, ensure_ascii=False)
