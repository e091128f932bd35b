"""A grammar behind reasoning: free text up to the end tag, then nothing but the grammar."""

from __future__ import annotations

import numpy as np
import pytest

from tabstop.errors import InputError
from tabstop.grammar import Constraint, Vocabulary, compile_constraints
from tabstop.grammar.specs import Thinking, choice_constraint, json_schema_constraint, thinking_constraint
from tabstop.text.tokenizer import Tokenizer
from tabstop.types import ConstraintSpec
from tests.text.fim_vocabularies import byte_level_definition

YES = choice_constraint(["yes"])


def make(marked: bool) -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer(byte_level_definition(("<|end|>", "<think>", "</think>"), marked=marked))
    size = tokenizer.vocab_size
    return tokenizer, Vocabulary(
        size,
        lambda: tokenizer.token_bytes,
        control=lambda: tokenizer.control_bytes,
        encode=lambda text: tokenizer.encode(text, control=False),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["tags", "control tokens"])
def made(request: pytest.FixtureRequest) -> tuple[Tokenizer, Vocabulary]:
    return make(request.param)


def thinking(tokenizer: Tokenizer, is_open: bool) -> ConstraintSpec:
    control = tokenizer.control_tokens
    return thinking_constraint(
        Thinking("<think>", "</think>", is_open, control.get("<think>"), control.get("</think>"))
    )


def compiled(specs: list[ConstraintSpec], vocabulary: Vocabulary) -> Constraint:
    """A sample's own copy: what is compiled is kept."""
    (constraint,) = compile_constraints(specs, vocabulary)
    return constraint.fork()


def follow(constraint: Constraint, tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    """Accepts ids as long as the masks allow them; whether the end token was allowed before each, and at the end."""
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    can_end = []
    for token_id in [*ids, None]:
        mask = np.full(-(-tokenizer.vocab_size // 32), -1, np.int32)
        constraint.fill(mask, np.array([end]))
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        can_end.append(bool(bits[end]))
        if token_id is not None:
            assert bits[token_id], f"{tokenizer.spelled(token_id)!r} is not allowed"
            constraint.accept(token_id)
    return can_end


@pytest.mark.parametrize(
    "text",
    [
        "<think>Any <b>text</b> {yes}, ☺\n\nno.\n</think>\n\nyes",
        "<think></think>yes",
        "<think>\n\n</think>\nyes",
        "yes",
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
def test_the_text_behind_follows(made: tuple[Tokenizer, Vocabulary], text: str, is_open: bool) -> None:
    tokenizer, vocabulary = made
    if is_open and "<think>" not in text:
        text = "</think>" + text
    ids = tokenizer.encode(text.removeprefix("<think>") if is_open else text)
    constraint = compiled([thinking(tokenizer, is_open), YES], vocabulary)
    assert not any(follow(constraint, tokenizer, ids)[:-1])  # never before the text is whole
    assert constraint.ended


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("no", False),
        ("hm yes", False),
        ("<think>a</think>no", False),
        ("a</think>\n\n\nyes", True),
        ("a</think> yes", True),
    ],
)
def test_other_texts_do_not(made: tuple[Tokenizer, Vocabulary], text: str, is_open: bool) -> None:
    tokenizer, vocabulary = made
    constraint = compiled([thinking(tokenizer, is_open), YES], vocabulary)
    with pytest.raises(AssertionError, match="is not allowed"):
        follow(constraint, tokenizer, tokenizer.encode(text))


def test_schemas_and_cached_grammars_are_told_apart() -> None:
    tokenizer, vocabulary = make(False)
    schema = json_schema_constraint({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    for is_open, text in ((True, "hm\n</think>\n\n"), (False, "")):
        specs = [thinking(tokenizer, is_open), schema]
        for _ in range(2):
            constraint = compiled(specs, vocabulary)
            follow(constraint, tokenizer, tokenizer.encode(text + '{"a": 1'))
    constraint = compiled([schema], vocabulary)
    with pytest.raises(AssertionError, match="is not allowed"):
        follow(constraint, tokenizer, tokenizer.encode("hm"))


def test_what_is_no_thinking() -> None:
    with pytest.raises(InputError, match="tags"):
        compile_constraints([ConstraintSpec("thinking", "{}"), YES], make(False)[1])
