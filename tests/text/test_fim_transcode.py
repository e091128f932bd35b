"""Raw prompts in foreign markers: what is recognised, and what is left alone."""

from __future__ import annotations

import pytest

from tabstop.text.fim import Hole
from tabstop.text.fim_families import FAMILIES
from tabstop.text.fim_transcode import parse_foreign


def nothing(token: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("prompt", "family", "hole"),
    [
        ("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "qwen", Hole("a", "b")),
        ("<fim_prefix>a<fim_suffix>b<fim_middle>", "starcoder2", Hole("a", "b")),
        ("<fim_suffix>b<fim_prefix>a<fim_middle>", "starcoder2", Hole("a", "b")),
        ("<fim-prefix><fim-suffix>b<fim-middle>", "santacoder", Hole("", "b")),
        ("<｜fim▁begin｜>a\n<｜fim▁hole｜>b<｜fim▁end｜>", "deepseek", Hole("a\n", "b")),
        ("<PRE> a <SUF>b <MID>", "codellama", Hole("a", "b")),
        ("<PRE>ctx \n a <SUF> b <MID>", "codellama", Hole("ctx \n a", " b")),
        ("<[fim-suffix]>b<[fim-prefix]>a<[fim-middle]>", "seed-coder", Hole("a", "b")),
    ],
)
def test_exactly_one_layout_is_parsed(prompt: str, family: str, hole: Hole) -> None:
    assert parse_foreign(prompt, nothing) == (family, hole)
    markers = {marker for known in FAMILIES for marker in (known.prefix, known.suffix, known.middle)}
    assert parse_foreign(prompt, lambda token: token in markers) is None


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "def f():",
        "<fim_prefix>a<fim_suffix>b<fim_middle>c",
        "x<fim_prefix>a<fim_suffix>b<fim_middle>",
        "<fim_prefix>a<fim_suffix>b<fim_suffix>c<fim_middle>",
        "<fim_prefix>a<fim_middle>",
        "<fim_middle>a<fim_prefix>b<fim_suffix>",
        "<fim_prefix>a<fim_suffix>b<|fim_middle|>",
        "[SUFFIX]b[PREFIX]a",
    ],
)
def test_everything_else_is_left_alone(prompt: str) -> None:
    assert parse_foreign(prompt, nothing) is None
