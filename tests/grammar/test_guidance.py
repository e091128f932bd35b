"""Grammars over a small real vocabulary: every way through is a text of the grammar, ends come only where it is whole,
and what would cost too much is refused.
"""

from __future__ import annotations

import json
import random
import re
import threading

import jsonschema
import numpy as np
import pytest

from tabstop.errors import InputError, OverloadedError
from tabstop.grammar import NO_IDS, Constraint, GrammarLimits, Vocabulary, compile_constraint, compile_constraints
from tabstop.grammar.guidance import MAX_RUNAWAYS
from tabstop.grammar.json_schema import explained
from tabstop.grammar.specs import (
    choice_constraint,
    gbnf_constraint,
    json_object_constraint,
    json_schema_constraint,
    lark_constraint,
    regex_constraint,
)
from tabstop.grammar.tokens import tokens_constraint
from tabstop.text.tokenizer import Tokenizer
from tabstop.types import ConstraintSpec, Sampling
from tests.tiny import ENDOFTEXT, IM_END, VOCAB_SIZE, tokenizer_json

SIZE = VOCAB_SIZE + 5  # a model may have more rows than its tokenizer has tokens
ENDS = np.array([ENDOFTEXT, IM_END])
TOKENIZER = Tokenizer(tokenizer_json())
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer", "minimum": -9, "maximum": 99}},
    "required": ["name"],
    "additionalProperties": False,
}
PRODUCT = {"allOf": [{"anyOf": [{"properties": {f"{i}.{j}": {}}} for j in range(10)]} for i in range(8)]}
"""Has 10^8 ways to be right."""

HEAVY = regex_constraint("((a{100}){100}){100}")
"""Takes llguidance its time to compile."""


def make_vocabulary(**limits) -> Vocabulary:
    return Vocabulary(
        SIZE,
        lambda: TOKENIZER.token_bytes,
        control=lambda: TOKENIZER.control_bytes,
        encode=lambda text: TOKENIZER.encode(text, control=False),
        limits=GrammarLimits(**limits),
    )


VOCABULARY = make_vocabulary()


def allowed(*constraints: Constraint, ends: np.ndarray = ENDS) -> list[int]:
    mask = np.full(-(-SIZE // 32), -1, np.int32)
    for constraint in constraints:
        constraint.fill(mask, ends)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[SIZE:].any()
    return np.flatnonzero(bits).tolist()


def spell(token_ids: list[int]) -> bytes:
    return b"".join(TOKENIZER.token_bytes[token_id] for token_id in token_ids)


def walk(constraints: list[Constraint], seed: int, most: int = 300, ends: np.ndarray = ENDS) -> bytes | None:
    """A random way to an end; None where there is none in so many tokens."""
    choose, tokens = random.Random(seed).choice, []
    while not any(constraint.ended for constraint in constraints):
        token_id = choose(allowed(*constraints, ends=ends))
        if token_id in ENDS:
            break
        tokens.append(token_id)
        for constraint in constraints:
            constraint.accept(token_id)
        if len(tokens) == most:
            return None
    return spell(tokens)


def is_of_schema(text: bytes) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


KINDS = {
    "schema": (json_schema_constraint(SCHEMA), is_of_schema),
    "object": (json_object_constraint(), lambda text: isinstance(json.loads(text), dict)),
    "regex": (regex_constraint(r"[a-c]{2,4}(\d+|é)?"), lambda text: re.fullmatch(r"[a-c]{2,4}(\d+|é)?", text.decode())),
    "choice": (choice_constraint(["def", 'a"\\\n', "ü😀", "defer"]), lambda text: text.decode() in CHOICES),
    "lark": (lark_constraint('start: "import " NAME\nNAME: /[a-z]{1,9}/'), re.compile(rb"import [a-z]{1,9}").fullmatch),
    "gbnf": (gbnf_constraint('root ::= "x" ("=" [0-9]{1,3})?'), re.compile(rb"x(=[0-9]{1,3})?").fullmatch),
}
CHOICES = ("def", 'a"\\\n', "ü😀", "defer")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_through_is_a_text_of_the_grammar(kind):
    spec, is_right = KINDS[kind]
    template = compile_constraint(spec, VOCABULARY)
    texts = [walk([template.fork()], seed) for seed in range(40)]
    found = [text for text in texts if text is not None]
    assert len(found) >= 20 and len(set(found)) > 1 and all(is_right(text) for text in found)


def test_gbnf_escapes_name_characters():
    constraint = compile_constraint(
        gbnf_constraint('root ::= "\\u00e9\\U0001F600\\x41\\\\u0041" [\\u0061-b]'), VOCABULARY
    )
    assert {walk([constraint.fork()], seed) for seed in range(9)} == {f"é😀A\\u0041{end}".encode() for end in "ab"}


def test_control_tokens_are_no_text():
    """Not even where their names would fit; unquoted, a grammar may name them."""
    free = compile_constraint(regex_constraint(r"(.|\n)*"), VOCABULARY)
    assert set(allowed(free)) & {*TOKENIZER.control_tokens.values(), *range(VOCAB_SIZE, SIZE)} == set(ENDS.tolist())
    assert allowed(compile_constraint(lark_constraint("start: <|im_start|>"), VOCABULARY)) == [
        TOKENIZER.control_tokens["<|im_start|>"]
    ]


def test_a_sample_may_end_where_its_text_is_whole():
    constraint = compile_constraint(regex_constraint("a+b"), VOCABULARY)
    letters = [TOKENIZER.token_id(letter) for letter in "ab"]
    assert not set(allowed(constraint)) & set(ENDS)
    optional = compile_constraint(regex_constraint("ab?"), VOCABULARY)
    optional.accept(letters[0])
    assert set(allowed(optional)) == {letters[1], *ENDS}
    assert allowed(optional, ends=NO_IDS) == letters[1:] and not optional.ended
    assert set(allowed(optional, ends=np.array([letters[1]]))) == {letters[1]}
    optional.accept(letters[1])
    assert optional.ended and not optional.released
    with pytest.raises(InputError, match="cannot be followed further"):
        constraint.fork().accept(letters[1])


def test_text_tokens_that_end_a_sample_do_so_only_where_the_text_is_whole():
    newline = TOKENIZER.token_id("Ċ")
    constraint = compile_constraint(regex_constraint(r"\n?x\n?"), VOCABULARY)
    assert newline in allowed(constraint) and newline not in allowed(constraint, ends=np.array([newline]))
    constraint.accept(TOKENIZER.token_id("x"))
    assert newline in allowed(constraint, ends=np.array([newline]))


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_and_forks_restore_every_state(kind):
    constraint = compile_constraint(KINDS[kind][0], VOCABULARY).fork()
    choose, masks, tokens = random.Random(3).choice, [], []
    while not constraint.ended and len(tokens) < 12:
        masks.append(allowed(constraint))
        inner = [token_id for token_id in masks[-1] if token_id not in ENDS]
        if not inner:
            break
        tokens.append(choose(inner))
        other = constraint.fork()
        constraint.accept(tokens[-1])
        assert allowed(other) == masks[-1]
    for num in (1, 2, len(tokens) - 3):
        if 0 < num <= len(tokens):
            constraint.rollback(num)
            del tokens[len(tokens) - num :]
            assert allowed(constraint) == masks[len(tokens)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("healed", [" re", "x", "é\n"])
def test_behind_healed_bytes_the_grammar_is_about_what_follows(kind, healed):
    spec, is_right = KINDS[kind]
    specs = (ConstraintSpec("healing", healed.encode().hex()), spec)
    texts = []
    for seed in range(12):
        constraints = [constraint.fork() for constraint in compile_constraints(specs, VOCABULARY)]
        texts.append(walk(constraints, seed))
    found = [text for text in texts if text is not None]
    assert found and all(text.startswith(healed.encode()) for text in found)
    assert all(is_right(text.removeprefix(healed.encode())) for text in found)


def test_a_token_may_lie_across_the_cursor():
    specs = (ConstraintSpec("healing", b"re".hex()), choice_constraint(["turn x", "y"]))
    constraints = compile_constraints(specs, VOCABULARY)
    assert TOKENIZER.token_id("return") in allowed(*constraints)
    assert TOKENIZER.token_id("ret") in allowed(*constraints)


def test_half_a_character_cannot_stand_before_a_grammar():
    specs = (ConstraintSpec("healing", "é".encode()[1:].hex()), choice_constraint(["a"]))
    with pytest.raises(InputError, match="whole characters"):
        compile_constraints(specs, VOCABULARY)


def test_allowed_and_banned_ids_beside_a_grammar():
    a, b, c = (TOKENIZER.token_id(letter) for letter in "abc")
    rules = tokens_constraint(Sampling(allowed_token_ids=(a, b, c, IM_END), banned=((c,), (a, b))))
    assert rules is not None and tokens_constraint(Sampling()) is None
    constraints = compile_constraints((regex_constraint("[a-d]+"), rules), VOCABULARY)
    assert allowed(*constraints) == [a, b]
    for constraint in constraints:
        constraint.accept(a)
    assert allowed(*constraints) == [a, IM_END]
    for constraint in constraints:
        constraint.rollback(1)
    assert allowed(*constraints) == [a, b]


def test_a_vocabulary_that_no_text_encodes_is_spelled_all_the_same():
    """A tokenizer that puts a blank before every text, and one that knows nothing: masks stay right."""
    for encode in (lambda text: TOKENIZER.encode(" " + text), lambda text: []):
        vocabulary = Vocabulary(SIZE, lambda: TOKENIZER.token_bytes, encode=encode)
        constraint = compile_constraint(choice_constraint(["return x", "retro"]), vocabulary)
        assert all(walk([constraint.fork()], seed) in (b"return x", b"retro") for seed in range(8))


# ---- what is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (regex_constraint("("), "regular expression cannot be used.*unclosed group"),
        (regex_constraint("(?=a)b"), "look-around"),
        (regex_constraint("a" * 70_000), "70000 bytes; at most 65536.*--max-grammar-bytes"),
        (json_schema_constraint("[1"), "not valid JSON"),
        (json_schema_constraint("[1]"), "must be an object"),
        (json_schema_constraint({"not": {}}), r'uses \["not"\], which cannot be followed'),
        (json_schema_constraint({"type": "nope"}), "nope"),
        (json_schema_constraint({"oneOf": [{"const": 1}, {"const": 2}]}), "use anyOf"),
        (json_schema_constraint({"$ref": "http://127.0.0.1/x"}), "127.0.0.1"),
        (json_schema_constraint({"x-guidance": {"lenient": True}, "not": {}}), "cannot be followed"),
        (json_schema_constraint('{"items":' * 70 + "{}" + "}" * 70), "64 levels deep.*--max-grammar-depth"),
        (json_schema_constraint('{"items":' * 4000 + "{}" + "}" * 4000), "64 levels deep"),
        (json_schema_constraint('{"maximum": 1e999, "minimum": 1}'), "cannot be used"),
        (json_schema_constraint({"$ref": "#"}), "cannot be used"),
        (json_schema_constraint(PRODUCT), "too large"),
        (ConstraintSpec("json_schema", "\ud800"), "Unicode"),
        (ConstraintSpec("json_schema", 5), "must be a text"),
        (ConstraintSpec("choice", "{}"), "list of at least one text"),
        (lark_constraint("start: other"), "other"),
        (lark_constraint("nothing"), "cannot be used"),
        (gbnf_constraint('root ::= "a'), "not valid GBNF"),
        (gbnf_constraint("root ::= " + "(" * 9000), "GBNF|deeply"),
        (gbnf_constraint("root ::= \n" + "\n" * 60_000 + "x"), "at most 16384 characters"),
        (gbnf_constraint('root ::= "\\uD800"'), "Unicode"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_the_clients_error(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        compile_constraint(spec, VOCABULARY)
    assert len(caught.value.message) < 500 and "\n" not in caught.value.message


def test_messages_name_no_option_that_a_client_lacks():
    assert "coerce" not in explained(
        "oneOf constraints are not supported. Enable 'coerce_one_of' option to approximate"
    )


def test_excluded_whole_numbers_are_excluded():
    """llguidance 1.9.1 allows 38 where 38 < x < 38.5 is asked for."""
    schema = {"enum": [{"exclusiveMinimum": 38, "maximum": 38.5}], "default": 1}
    number = {"type": "number", "exclusiveMinimum": 38, "exclusiveMaximum": 38.5}
    constraint = compile_constraint(json_schema_constraint({"properties": {"x": number}, "type": "object"}), VOCABULARY)
    texts = []
    for text in ('{"x":38', '{"x":38.2'):
        other = constraint.fork()
        for token_id in TOKENIZER.encode(text):
            other.accept(token_id)
        texts.append(TOKENIZER.token_id("}") in allowed(other))
    assert texts == [False, True]
    same = compile_constraint(json_schema_constraint(schema), VOCABULARY)
    assert json.loads(walk([same.fork()], 0) or b"") == schema["enum"][0]


def test_compiling_too_long_is_the_clients_error_and_known_the_next_time():
    vocabulary = make_vocabulary(compile_seconds=0.001)
    with pytest.raises(InputError, match=r"took over 0\.001 seconds to compile.*--grammar-timeout"):
        compile_constraint(HEAVY, vocabulary)
    num_threads = threading.active_count()
    with pytest.raises(InputError, match="took over"):
        compile_constraint(HEAVY, vocabulary)
    assert threading.active_count() <= num_threads


def test_too_many_endless_compilations_refuse_more(monkeypatch):
    vocabulary = make_vocabulary(compile_seconds=0.01)
    guidance, gate = vocabulary.guidance, threading.Event()
    monkeypatch.setattr(guidance, "_make", lambda *_: gate.wait(60))
    for number in range(MAX_RUNAWAYS):
        with pytest.raises(InputError, match="took over"):
            compile_constraint(regex_constraint(f"a{number}"), vocabulary)
    with pytest.raises(OverloadedError):
        compile_constraint(regex_constraint("b"), vocabulary)
    gate.set()
    monkeypatch.undo()
    while guidance._num_runaways:
        threading.Event().wait(0.01)
    guidance.limits = GrammarLimits()  # a busy machine takes longer than a hundredth of a second
    compile_constraint(regex_constraint("b"), vocabulary)


def test_compiled_grammars_are_kept_but_not_all():
    vocabulary = make_vocabulary(num_cached=2)
    made = []
    make = vocabulary.guidance._make
    vocabulary.guidance._make = lambda grammar, name: made.append(grammar) or make(grammar, name)
    for pattern in ("a", "b", "a", "c", "a", "b"):
        compile_constraint(regex_constraint(pattern), vocabulary)
    assert len(made) == 4


def test_an_ambiguous_grammar_ends_before_it_has_cost_much():
    """It holds a part of the step's time at most, and what it took is bounded over all of its tokens."""
    ambiguous = lark_constraint('start: s\ns: s s s | s s | /[a-z]/ | ""')
    constraint = compile_constraint(ambiguous, VOCABULARY).fork()
    with pytest.raises(InputError, match=r"takes too long to follow|cannot be followed further"):
        walk([constraint], 1, most=400, ends=NO_IDS)
