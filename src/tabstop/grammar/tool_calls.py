"""Calls of tools as a constraint: a grammar in Lark that names the schemas of arguments, from tools/constraint.py."""

from __future__ import annotations

import json
from typing import Any

from tabstop.errors import InputError
from tabstop.grammar import Before, Vocabulary
from tabstop.grammar.guidance import Grammar, check_size
from tabstop.grammar.json_schema import prepared


def compile_tool_calls(value: Any, vocabulary: Vocabulary, before: Before = b"") -> Grammar:
    """`value`: JSON, {"grammar": Lark, "schemas": {name: {"schema", "strict"}}}. Raises InputError.

    Of a schema that is not strict, what cannot be followed is left out.
    """
    check_size(value, vocabulary.limits, "the grammar of the tools")
    given = json.loads(value)
    grammars: list[dict[str, Any]] = [{"name": "calls", "lark_grammar": given["grammar"]}]
    for name, entry in given["schemas"].items():
        try:
            grammar = json.loads(prepared(json.dumps(entry["schema"]), vocabulary.limits.max_depth))
        except InputError as error:
            raise InputError(f"tools: {error.message}") from None
        grammar["json_schema"]["x-guidance"]["lenient"] = not entry["strict"]
        grammars.append({"name": name} | grammar)
    return vocabulary.guidance.compile(json.dumps(grammars), before, "a schema of the tools")
