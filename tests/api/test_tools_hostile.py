"""Bodies with tools as nobody should send them: an error that says so, never a failure of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.api.dialects.openai import ChatBody, chat_call
from tabstop.api.fields import Caller
from tabstop.api.schema import decode_body
from tabstop.checkpoint import open_checkpoint
from tabstop.encoding import PromptPolicy, encode_prompts
from tabstop.engine.fake import INFO
from tabstop.errors import InputError, NotSupportedError, TabstopError
from tabstop.grammar import GrammarLimits, Vocabulary, compile_constraints
from tabstop.text import ModelText, TextOptions, load_text
from tests.tools.models import tool_model

FORMS = ("hermes", "qwen3_coder", "mistral")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[ModelText]:
    folder: Path = tool_model(tmp_path_factory.mktemp("tools") / "tiny")
    return [load_text(open_checkpoint(str(folder)), options=TextOptions(tool_format=form)) for form in FORMS]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYWORDS = st.sampled_from(
    ["type", "properties", "items", "anyOf", "allOf", "oneOf", "$ref", "enum", "const", "required", "$defs", "not"]
)
VALUES = st.sampled_from(
    ["object", "string", "integer", ["string", "null"], "#", "#/$defs/a", "#/properties/a", True, {}, []]
)
SCHEMAS = st.recursive(
    st.dictionaries(KEYWORDS, VALUES, max_size=3),
    lambda inner: (
        st.dictionaries(KEYWORDS, inner | st.lists(inner, max_size=2) | VALUES | JSON, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b\n", '"', ">"]), inner, max_size=2).map(
            lambda found: {"properties": found}
        )
    ),
    max_leaves=8,
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g", "a b"]) | JSON},
    optional={"parameters": SCHEMAS, "strict": st.booleans() | JSON, "x": JSON},
)
TOOLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTIONS}) | JSON, max_size=2) | JSON
CHOICES = (
    st.sampled_from(["auto", "none", "required", "any"])
    | st.sampled_from(["f", "g"]).map(lambda name: {"type": "function", "function": {"name": name}})
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["function", "allowed_tools"])}, optional={"allowed_tools": JSON, "function": JSON}
    )
    | JSON
)


@given(TOOLS, CHOICES, st.sampled_from(range(len(FORMS))))
@settings(max_examples=300, deadline=None)
def test_any_tools_are_read_or_refused(texts: list[ModelText], tools: Any, choice: Any, at: int) -> None:
    run(texts[at], {"tools": tools, "tool_choice": choice})


@given(SCHEMAS, st.booleans(), st.sampled_from(range(len(FORMS))))
@settings(max_examples=150, deadline=None)
def test_any_parameters_are_followed_or_refused(texts: list[ModelText], schema: Any, strict: bool, at: int) -> None:
    """Up to the compiled grammar."""
    function = {"name": "f", "parameters": schema, "strict": strict}
    run(texts[at], {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}, compiles=True)


def run(text: ModelText, fields: dict[str, Any], *, compiles: bool = False) -> None:
    """All that happens to a body before the engine draws a token."""
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]} | fields).encode()
    try:
        call = chat_call(decode_body(body, ChatBody), Caller())
        (prompt,) = encode_prompts(call, text, INFO, PromptPolicy())
        if compiles and prompt.constraints:
            assert compile_constraints(prompt.constraints, vocabulary_of(text))
    except (InputError, NotSupportedError) as error:
        assert error.status == 400 and error.message
    except TabstopError as error:
        raise AssertionError(f"{error.code}: {error.message}") from error


VOCABULARIES: dict[int, Vocabulary] = {}


def vocabulary_of(text: ModelText) -> Vocabulary:
    tokenizer = text.tokenizer
    made = Vocabulary(
        tokenizer.vocab_size,
        lambda: tokenizer.token_bytes,
        control=lambda: tokenizer.control_bytes,
        encode=lambda piece: tokenizer.encode(piece, control=False),
        limits=GrammarLimits(),
    )
    return VOCABULARIES.setdefault(id(text), made)
