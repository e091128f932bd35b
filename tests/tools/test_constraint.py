"""Grammars that force calls: which texts they allow, over a real vocabulary with every family's markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import InputError
from tabstop.grammar import NO_IDS, Vocabulary, compile_constraints
from tabstop.grammar.specs import Thinking, json_schema_constraint, thinking_constraint
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tabstop.tools import Function, ToolFormat, ToolUse
from tabstop.tools.constraint import calls_constraint
from tabstop.types import ConstraintSpec
from tests.tools.models import tool_model
from tests.tools.reading import made
from tests.tools.test_formats import HERMES, TWO

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"type": "string"}},
    "required": ["n"],
    "additionalProperties": False,
}
USE = ToolUse((Function("f", SCHEMA), Function("g")), is_required=True)
GOOD, BAD = '{"n": 5, "s": "\\"é\\\\"}', '{"n": "5"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tool_model(tmp_path_factory.mktemp("tools") / "tiny")
    return load_tokenizer(open_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(
        tokenizer.vocab_size,
        lambda: tokenizer.token_bytes,
        control=lambda: tokenizer.control_bytes,
        encode=lambda text: tokenizer.encode(text, control=False),
    )


def allows(specs: list[ConstraintSpec], text: str, tokenizer: Tokenizer, vocabulary: Vocabulary) -> bool:
    """Whether the text may be drawn, token by token, and be the whole answer."""
    (constraint,) = compile_constraints(specs, vocabulary)
    constraint = constraint.fork()
    end = tokenizer.control_tokens["<|im_end|>"]
    for token in tokenizer.encode(text):
        mask = np.full(-(-vocabulary.size // 32), -1, np.int32)
        constraint.fill(mask, NO_IDS)
        if not mask[token // 32] >> token % 32 & 1:
            return False
        constraint.accept(token)
    if constraint.ended:
        return True
    mask = np.full(-(-vocabulary.size // 32), -1, np.int32)
    constraint.fill(mask, np.array([end]))
    return bool(mask[end // 32] >> end % 32 & 1)


def forced(form: ToolFormat, tokenizer: Tokenizer, use: ToolUse = USE, **more: Any) -> list[ConstraintSpec]:
    return [calls_constraint(form, use, tokenizer.control_tokens, **more)]


FORCED = {
    "hermes": TWO["hermes"],
    "mistral": TWO["mistral"].replace(', "id": "123456789"', ""),
    "mistral [ARGS]": TWO["mistral 2025"],
    "deepseek ```json": TWO["deepseek"],
    "deepseek": TWO["deepseek 3.1"],
    "llama3": TWO["llama3"],
    "granite": TWO["granite"],
}


@pytest.mark.parametrize("form", FORCED)
def test_calls_as_models_write_them(form: str, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    made_form, text = made(form.split()[0], form), FORCED[form]
    specs = forced(made_form, tokenizer)
    for good in (text.format("f", GOOD, "g", '{"any": [1]}'), text.format("g", "{}", "f", '{"n":1}')):
        assert allows(specs, good, tokenizer, vocabulary)
        single = forced(made_form, tokenizer, ToolUse(USE.functions, is_required=True, is_parallel=False))
        assert not allows(single, good, tokenizer, vocabulary)
    for bad in (text.format("f", BAD, "g", "{}"), text.format("h", "{}", "g", "{}"), text.format("g", "[]", "g", "{}")):
        assert not allows(specs, bad, tokenizer, vocabulary)
    assert not allows(specs, "", tokenizer, vocabulary) and not allows(specs, "hello", tokenizer, vocabulary)


CODER = "<tool_call>\n<function={}>\n{}</function>\n</tool_call>"


def test_qwen_coder(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    schema = {
        "$defs": {"small": {"type": "integer", "maximum": 9, "minimum": 0}},
        "type": "object",
        "properties": {
            "code": {"type": "string"},
            "short": {"type": "string", "maxLength": 3},
            "kind": {"enum": ["a", "b c"]},
            "n": {"$ref": "#/$defs/small"},
            "o": {"type": "object", "properties": {"k": {"$ref": "#/$defs/small"}}, "required": ["k"]},
        },
        "required": ["code", "n"],
    }
    specs = forced(made("qwen3_coder"), tokenizer, ToolUse((Function("f", schema), Function("g"))))
    parts = {
        "code": "if x < 1:\n\n    return '</parameter>'\n",
        "short": "é>",
        "kind": "b c",
        "n": "7",
        "o": '{"k": 1}',
    }

    def written(**changed: str | None) -> str:
        given = {key: value for key, value in (parts | changed).items() if value is not None}
        return CODER.format("f", "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in given.items()))

    for good in ({}, {"short": None}, {"kind": "a", "o": None}, {"short": None, "kind": None, "o": None}):
        assert allows(specs, written(**good), tokenizer, vocabulary), good
    for bad in ({"code": None}, {"n": None}, {"n": "12"}, {"kind": "c"}, {"o": "{}"}, {"short": "abcd"}, {"x": "1"}):
        assert not allows(specs, written(**bad), tokenizer, vocabulary), bad
    assert allows(specs, CODER.format("g", ""), tokenizer, vocabulary)
    assert allows(specs, CODER.format("g", "") + "\n" + written(), tokenizer, vocabulary)


def test_markers_are_control_tokens_where_the_vocabulary_has_them(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Spelled by other tokens they are not what the model was trained on."""
    (spec,) = forced(made("mistral"), tokenizer)
    assert f"<[{tokenizer.control_tokens['[TOOL_CALLS]']}]>" in json.loads(spec.value)["grammar"]
    text = TWO["mistral"].format("g", "{}", "g", "{}")
    plain = tokenizer.encode(text, control=False)
    (constraint,) = compile_constraints([spec], vocabulary)
    mask = np.full(-(-vocabulary.size // 32), -1, np.int32)
    constraint.fork().fill(mask, NO_IDS)
    assert not mask[plain[0] // 32] >> plain[0] % 32 & 1
    (spec,) = forced(made("hermes"), tokenizer)
    assert "<[" not in json.loads(spec.value)["grammar"]  # <tool_call> is an ordinary token here


@pytest.mark.parametrize("is_open", [True, False])
def test_calls_behind_reasoning(is_open: bool, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    thinking = thinking_constraint(Thinking("<think>", "</think>", is_open))
    specs = [thinking, *forced(made("hermes"), tokenizer)]
    call = HERMES.format("f", GOOD)
    thought = ("" if is_open else "<think>") + "so <tool_call> or not</think>\n\n"
    assert allows(specs, thought + call, tokenizer, vocabulary)
    assert allows(specs, call, tokenizer, vocabulary) is not is_open
    assert not allows(specs, thought + "hello", tokenizer, vocabulary)
    assert not allows(specs, thought + HERMES.format("f", BAD), tokenizer, vocabulary)


def test_a_call_or_json(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    content = json_schema_constraint({"type": "array", "items": {"type": "integer"}})
    for form, text in FORCED.items():
        specs = forced(made(form.split()[0], form), tokenizer, content=content)
        assert allows(specs, "[1, 2]", tokenizer, vocabulary)
        assert allows(specs, text.format("f", GOOD, "g", "{}"), tokenizer, vocabulary)
        assert not allows(specs, '["1"]', tokenizer, vocabulary)
    with pytest.raises(InputError, match="not valid JSON"):
        forced(made("hermes"), tokenizer, content=ConstraintSpec("json_schema", "{"))


def test_only_strict_functions_are_followed_to_the_letter(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    schema = SCHEMA | {"not": {"required": ["s"]}}
    for strict in (True, False):
        specs = forced(made("hermes"), tokenizer, ToolUse((Function("f", schema, strict),)))
        if strict:
            with pytest.raises(InputError, match=r"a schema of the tools.*cannot be followed"):
                allows(specs, "", tokenizer, vocabulary)
        else:
            assert allows(specs, HERMES.format("f", GOOD), tokenizer, vocabulary)
            assert not allows(specs, HERMES.format("f", BAD), tokenizer, vocabulary)


def test_names_and_keys_are_texts_of_the_grammar(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "properties": {'a"\\\n': {"type": "integer"}}, "required": ['a"\\\n']}
    use = ToolUse((Function("x.y-z", schema),))
    text = CODER.format("x.y-z", '<parameter=a"\\\n>\n5\n</parameter>\n')
    assert allows(forced(made("qwen3_coder"), tokenizer, use), text, tokenizer, vocabulary)
    with pytest.raises(InputError, match="not valid Unicode"):
        forced(made("qwen3_coder"), tokenizer, ToolUse((Function("f", {"properties": {"\ud800": {}}}),)))
    big = Function("f", {"properties": {f"p{n}": {"type": "integer"} for n in range(9000)}})
    with pytest.raises(InputError, match="--max-grammar-bytes"):
        allows(forced(made("hermes"), tokenizer, ToolUse((big,))), "", tokenizer, vocabulary)


def test_descriptions_are_no_part_of_a_grammar(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """But what is called so is."""
    words = {"title": "x" * 9000, "description": "x" * 60_000, "examples": [1], "default": {"const": 1}}
    inner = {"type": "object", "properties": {"title": {"enum": [{"description": 1}]} | words}, "required": ["title"]}
    schema = words | {"$defs": {"default": inner}, "properties": {"description": {"$ref": "#/$defs/default"} | words}}
    use = ToolUse((Function("f", schema | {"required": ["description"], "additionalProperties": False}),))
    specs = forced(made("hermes"), tokenizer, use)
    assert len(specs[0].value) < 1000
    assert allows(specs, HERMES.format("f", '{"description": {"title": {"description": 1}}}'), tokenizer, vocabulary)
    for bad in ('{"description": {"title": {}}}', '{"description": {}}', "{}"):
        assert not allows(specs, HERMES.format("f", bad), tokenizer, vocabulary)


def test_deep_parameters_are_refused(tokenizer: Tokenizer) -> None:
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"items": deep}
    for form in ("hermes", "qwen3_coder"):
        with pytest.raises(InputError, match="nested too deeply"):
            forced(made(form), tokenizer, ToolUse((Function("f", {"properties": {"a": deep}, "required": ["a"]}),)))
