"""Every family's layout from tokenizer files alone: detection, round trips, injection, budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.errors import ConfigError, InputError
from tabstop.text.fim import FillIn, Hole, load_fill_in
from tabstop.text.fim_budget import divide, keep_end, keep_start
from tabstop.text.fim_detection import choose, detect, stop_token_ids
from tabstop.text.fim_families import FAMILIES
from tabstop.text.fim_frames import SourceFile, Surroundings
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests.api.serving import text_checkpoint
from tests.text.fim_vocabularies import (
    ALL,
    BIGCODE,
    any_family,
    byte_level,
    byte_level_definition,
    sentencepiece,
    write,
)

PREFIX, SUFFIX = "def f(x):\n    ret", " x\n\nprint(f(10))\n"
BUDGET = 10_000


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The ids as text, markers and all."""
    names = {token_id: name for name, token_id in tokenizer.control_tokens.items()}
    for family in FAMILIES:
        names |= {i: name for name in family.stop_tokens if (i := tokenizer.token_id(name)) is not None}
    return b"".join(names[i].encode() if i in names else tokenizer.bytes_of([i]) for i in ids).decode()


def lay_out(folder: Path, family: str, hole: Hole) -> str:
    checkpoint = any_family(folder, family)
    tokenizer = load_tokenizer(checkpoint)
    return spelled(tokenizer, load_fill_in(checkpoint, tokenizer).encode(hole, BUDGET).ids)


@pytest.mark.parametrize("family", ALL)
def test_every_family_is_found_in_its_vocabulary(family: str, tmp_path: Path) -> None:
    checkpoint = any_family(tmp_path, family)
    tokenizer = load_tokenizer(checkpoint)
    found = detect(checkpoint, tokenizer)
    assert found is not None and found.name == family
    assert choose(checkpoint, tokenizer, "off") is None and choose(checkpoint, tokenizer, family) == found
    with pytest.raises(ConfigError, match="choose auto, off or one of qwen"):
        choose(checkpoint, tokenizer, "nobody")
    lacking = "santacoder" if family != "santacoder" else "qwen"
    with pytest.raises(ConfigError, match="lacks"):
        choose(checkpoint, tokenizer, lacking)


def test_equal_markers_are_told_apart(tmp_path: Path) -> None:
    """Two Llamas with BigCode's tokens: Granite's layers have biases. And a vocabulary without markers has none."""
    definition = byte_level_definition(BIGCODE)
    for index, (name, config, expected) in enumerate(
        [
            ("m", {"model_type": "llama", "attention_bias": True}, "granite-code"),
            ("m", {"model_type": "llama"}, "mellum"),
            ("Mellum-4b", {"model_type": "other"}, "mellum"),
            ("m", {"model_type": "qwen2"}, "starcoder"),
            ("stable-code-3b", {"model_type": "other"}, "stablecode"),
        ]
    ):
        checkpoint = write(tmp_path / str(index), name, definition, config, {})
        found = detect(checkpoint, load_tokenizer(checkpoint))
        assert found is not None and found.name == expected
    checkpoint = text_checkpoint(tmp_path / "none")
    assert detect(checkpoint, load_tokenizer(checkpoint)) is None


LAYOUTS = {
    "qwen": "<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
    "codegemma": "<bos><|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
    "granite": "<|fim_prefix|>{P}<|fim_suffix|>{S}<|fim_middle|>",
    "starcoder": "<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
    "starcoder2": "<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
    "granite-code": "<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
    "stablecode": "<fim_prefix>{P}<fim_suffix>{S}<fim_middle>",
    "mellum": "<fim_suffix>{S}<fim_prefix>{P}<fim_middle>",
    "santacoder": "<fim-prefix>{P}<fim-suffix>{S}<fim-middle>",
    "deepseek": "<｜begin▁of▁sentence｜><｜fim▁begin｜>{P}<｜fim▁hole｜>{S}<｜fim▁end｜>",
    "codellama": "<s>▁<PRE> {P}▁<SUF>{S}▁<MID>",  # the blank after PRE is the vocabulary's own
    "mistral": "<s>[SUFFIX]{S}[PREFIX] {P}",
    "seed-coder": "<[fim-suffix]>{S}<[fim-prefix]>{P}<[fim-middle]>",
    "codegeex": "<|user|>\n###PATH:\n###LANGUAGE:\n###MODE:BLOCK\n<|code_suffix|>{S}<|code_prefix|>{P}<|code_middle|>"
    "<|assistant|>\n",
    "glm": "<|code_prefix|>{P}<|code_suffix|>{S}<|code_middle|>",
    "falcon-h1": "<|prefix|>{P}<|suffix|>{S}<|middle|>",
}


@pytest.mark.parametrize("family", ALL)
def test_layout(family: str, tmp_path: Path) -> None:
    assert set(LAYOUTS) == set(ALL)
    assert lay_out(tmp_path, family, Hole(PREFIX, SUFFIX)) == LAYOUTS[family].format(P=PREFIX, S=SUFFIX)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("starcoder", "<fim_prefix><fim_suffix>{S}<fim_middle>{P}"),
        ("codellama", "<s>▁<PRE>▁<SUF>{S}▁<MID> {P}"),
        ("mellum", "<fim_suffix>{S}<fim_prefix>{P}<fim_middle>"),
    ],
)
def test_suffix_first_where_it_was_trained(family: str, expected: str, tmp_path: Path) -> None:
    assert lay_out(tmp_path, family, Hole(PREFIX, SUFFIX, order="spm")) == expected.format(P=PREFIX, S=SUFFIX)
    for other in ("qwen", "deepseek"):
        with pytest.raises(InputError, match="was not trained on 'spm'"):
            lay_out(tmp_path / other, other, Hole(PREFIX, SUFFIX, order="spm"))


def test_an_empty_suffix_is_what_the_family_takes_for_one(tmp_path: Path) -> None:
    assert lay_out(tmp_path / "q", "qwen", Hole("a", "")) == "<|fim_prefix|>a<|fim_suffix|>\n<|fim_middle|>"
    assert lay_out(tmp_path / "m", "mistral", Hole("a", "")) == "<s>[SUFFIX][PREFIX] a"


AROUND = Surroundings(
    (SourceFile("a.py", "A = 1\n"), SourceFile("b.py", "B = 2")), repo_name="tabs", path="c.py", language="python"
)
FRAMED = {
    "qwen": "<|repo_name|>tabs\n<|file_sep|>a.py\nA = 1\n<|file_sep|>b.py\nB = 2\n<|file_sep|>c.py\n"
    "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>",
    "starcoder2": "<repo_name>tabs<file_sep>a.py\nA = 1\n<file_sep>b.py\nB = 2<file_sep><fim_prefix>c.py\nP"
    "<fim_suffix>S<fim_middle>",
    "mellum": "<filename>a.py\nA = 1\n<filename>b.py\nB = 2\n<filename>c.py\n<fim_suffix>S<fim_prefix>P<fim_middle>",
    "codegemma": "<bos>a.py\nA = 1\n<|file_separator|>b.py\nB = 2\n<|file_separator|>c.py\n"
    "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>",
    "deepseek": "<｜begin▁of▁sentence｜><｜fim▁begin｜># a.py\nA = 1\n# b.py\nB = 2\n# c.py\nP"
    "<｜fim▁hole｜>S<｜fim▁end｜>",
    "mistral": "<s>[SUFFIX]S[PREFIX] +++++ a.py\nA = 1\n\n+++++ b.py\nB = 2\n\n+++++ c.py\nP",
    "codegeex": "<|user|>\n###REFERENCE:\n###PATH:a.py\nA = 1\n###REFERENCE:\n###PATH:b.py\nB = 2\n###PATH:c.py\n"
    "###LANGUAGE:python\n###MODE:BLOCK\n<|code_suffix|>S<|code_prefix|>P<|code_middle|><|assistant|>\n",
    "starcoder": "<fim_prefix><reponame>tabs<filename>c.py\n# a.py\nA = 1\n# b.py\nB = 2\nP<fim_suffix>S<fim_middle>",
    "granite-code": "<fim_prefix># a.py\nA = 1\n# b.py\nB = 2\n# c.py\nP<fim_suffix>S<fim_middle>",
    "santacoder": "<fim-prefix># a.py\nA = 1\n# b.py\nB = 2\n# c.py\nP<fim-suffix>S<fim-middle>",
}


@pytest.mark.parametrize("family", FRAMED)
def test_files_of_the_repository(family: str, tmp_path: Path) -> None:
    assert lay_out(tmp_path, family, Hole("P", "S", AROUND)) == FRAMED[family]


def marker_counts(tokenizer: Tokenizer, fill: FillIn, ids: list[int]) -> int:
    return sum(token_id in fill.marker_ids | set(tokenizer.control_tokens.values()) for token_id in ids)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("marked", [True, False])
def test_no_text_becomes_a_marker(family: str, marked: bool, tmp_path: Path) -> None:
    """Every special token's text in every field: as many markers as without, and every byte is there."""
    checkpoint = (
        byte_level(tmp_path, family, marked=marked)
        if family not in ("codellama", "mistral")
        else sentencepiece(tmp_path, family, controls=marked)
    )
    tokenizer = load_tokenizer(checkpoint)
    fill = load_fill_in(checkpoint, tokenizer)
    assert fill.family is not None
    names = {*tokenizer.control_tokens, *fill.family.stop_tokens, "<|file_sep|>", "<PRE>", "[INST]"}
    for name in sorted(names):
        text = f"a {name}b{name}"
        around = Surroundings((SourceFile(text, text),), repo_name=text, path=text, language="x")
        harmless = Surroundings((SourceFile("p", "t"),), repo_name="r", path="p", language="x")
        ids = fill.encode(Hole(text, text, around), BUDGET).ids
        expected = fill.encode(Hole("p", "s", harmless), BUDGET).ids
        assert marker_counts(tokenizer, fill, ids) == marker_counts(tokenizer, fill, expected), name
        plain = tokenizer.bytes_of(fill.encode(Hole(text, "s"), BUDGET).ids).decode()
        assert text.replace("▁", " ") in plain.replace("▁", " ")


@pytest.mark.parametrize("family", ["starcoder2", "codellama"])
def test_a_file_full_of_markers_is_only_text(family: str, tmp_path: Path) -> None:
    """Thousands of them, in a vocabulary that does not mark them as special."""
    make = byte_level if family == "starcoder2" else sentencepiece
    checkpoint = make(tmp_path, family, **{"marked" if family == "starcoder2" else "controls": False})
    tokenizer = load_tokenizer(checkpoint)
    fill = load_fill_in(checkpoint, tokenizer)
    text = "<fim_prefix>" * 3000 + " <PRE>" * 3000
    ids = fill.encode(Hole(text, text), 1_000_000).ids
    assert sum(token_id in fill.layout_ids for token_id in ids) == 3
    assert tokenizer.bytes_of(ids).decode().count("<fim_prefix>") >= 6000


def test_codellama_blanks_are_kept(tmp_path: Path) -> None:
    """A suffix that begins with blanks keeps them, one that does not gets none."""
    for suffix in ("x", " x", "    x", "\n  x", "é"):
        text = lay_out(tmp_path, "codellama", Hole("def ", suffix))
        assert text == f"<s>▁<PRE> def ▁<SUF>{suffix}▁<MID>"


def test_without_markers_the_prefix_is_continued(tmp_path: Path) -> None:
    checkpoint = text_checkpoint(tmp_path)
    tokenizer = load_tokenizer(checkpoint)
    fill = load_fill_in(checkpoint, tokenizer)
    filled = fill.encode(Hole(PREFIX, SUFFIX), BUDGET)
    assert filled.ids == tokenizer.encode(PREFIX) and filled.report.family is None


def test_the_whole_stop_set(tmp_path: Path) -> None:
    checkpoint = any_family(tmp_path, "qwen")
    tokenizer = load_tokenizer(checkpoint)
    assert stop_token_ids(tokenizer) == set(tokenizer.control_tokens.values())


# ---- budgets


def test_unused_shares_are_passed_on() -> None:
    assert divide(100, [500, 500, 500]) == [50, 20, 30]
    assert divide(100, [500, 5, 0]) == [95, 5, 0]
    assert divide(100, [10, 500, 10]) == [10, 80, 10]
    assert divide(100, [10, 10, 10]) == [10, 10, 10]
    assert divide(0, [1, 1, 1]) == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab \né", max_size=120), st.integers(0, 60))
def test_cuts_keep_within_the_budget(tiny_tokenizer: Tokenizer, text: str, budget: int) -> None:
    def encode(part: str):
        return tiny_tokenizer.encode_with_offsets(part, control=False)

    end, start = keep_end(text, budget, encode), keep_start(text, budget, encode)
    assert text.endswith(end) and text.startswith(start)
    assert len(encode(end).ids) <= budget and len(encode(start).ids) <= budget
    if len(encode(text).ids) <= budget:
        assert end == start == text


def test_cuts_are_at_lines_and_reported(tmp_path: Path) -> None:
    checkpoint = any_family(tmp_path, "qwen")
    tokenizer = load_tokenizer(checkpoint)
    fill = load_fill_in(checkpoint, tokenizer)
    lines = "".join(f"line {n}\n" for n in range(200))
    files = tuple(SourceFile(f"{n}.py", lines) for n in range(3))
    filled = fill.encode(Hole(lines + "ret", lines, Surroundings(files)), 600)
    assert len(filled.ids) <= 600 and set(filled.report.cut_tokens) == {"prefix", "suffix", "files"}
    text = spelled(tokenizer, filled.ids)
    prefix, _, suffix = text.partition("<|fim_prefix|>")[2].partition("<|fim_suffix|>")
    suffix = suffix.removesuffix("<|fim_middle|>")
    assert lines.endswith(prefix.removesuffix("ret")) and prefix.startswith("line ") and prefix.endswith("ret")
    assert lines.startswith(suffix) and suffix.endswith("\n") and "2.py" in text and "0.py" not in text
    whole = fill.encode(Hole("a", "b"), 600)
    assert whole.report.cut_tokens == {}


def test_typing_keeps_the_start_of_a_cut_prefix(tmp_path: Path) -> None:
    """The cache finds what does not move: sixteen typed lines move the left edge about once."""
    checkpoint = any_family(tmp_path, "qwen")
    fill = load_fill_in(checkpoint, load_tokenizer(checkpoint))
    text, starts = "".join(f"line {n % 10}\n" for n in range(300)), set()
    for _ in range(16):
        text += "line x\n"
        starts.add(tuple(fill.encode(Hole(text, "s"), 500).ids[:40]))
    assert len(starts) <= 2


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_crlf_files_are_read_as_lf(tmp_path: Path, order: str) -> None:
    hole = Hole("a\r\nb", "c\r\n", order=order)
    assert hole.has_crlf
    text = lay_out(tmp_path, "starcoder", hole)
    assert "\r" not in text and "a\nb" in text and "c\n" in text
