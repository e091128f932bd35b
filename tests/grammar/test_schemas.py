"""Random schemas, answered by a random model in one batch: what is finished is valid, as jsonschema sees it.

A tenth of the whole set; `python -m tests.grammar.schemas 1000` is all of it.
"""

from __future__ import annotations

import json

import pytest

from tabstop.types import FinishReason
from tests.grammar.schemas import Generator, answers, judge
from tests.tiny import tiny_llama

NUM = 100


def test_answers_to_random_schemas_are_valid(tmp_path):
    model = str(tiny_llama(tmp_path / "tiny", max_position_embeddings=1024))
    finishes, wrong = [], []
    for schema, text, finish, failure in answers(model, list(range(NUM)), num_threads=1):
        assert not failure, (failure, schema)
        finishes.append(finish)
        if finish is FinishReason.STOP and (why := judge(schema, text)):
            wrong.append((why, schema, text))
    assert wrong == []
    assert finishes.count(FinishReason.STOP) > 0.9 * NUM and set(finishes) <= {FinishReason.STOP, FinishReason.LENGTH}


def test_the_generator_uses_what_schemas_have():
    text = "".join(json.dumps(Generator(seed).schema()) for seed in range(NUM))
    words = (
        *("$ref", "$defs", "definitions", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "format", "required"),
        *("additionalProperties", "patternProperties", "maxProperties", "prefixItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "null"),
    )
    assert [word for word in words if f'"{word}"' not in text] == []


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, "1.5"),
        ({"type": "string", "format": "uuid"}, '"x"'),
        ({"type": "string", "format": "date-time"}, '"2020-13-01T00:00:00Z"'),
        ({"type": "object", "additionalProperties": False}, '{"a": 1}'),
        ({}, "{"),
    ],
)
def test_the_judge_sees_what_is_wrong(schema, text):
    assert judge(schema, text)
