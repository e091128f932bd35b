from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.checkpoint import Checkpoint
from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests import tiny
from tests.text.sources import code_lines

MARK = "\ufdd0"
TINY = Tokenizer(tiny.tokenizer_json(), bos_token="<|im_start|>", add_bos=True)
PIECES = st.sampled_from(["<|im_end|>", "<|im_start|>", "<|", "|>", "<", "im_end", ">", "|", " ", "a", "é", "😀", "\n"])
TEXTS = st.lists(PIECES, max_size=12).map("".join)


def test_ids_of_code_equal_the_original_tokenizer(default_tokenizer: Tokenizer, default_oracle) -> None:
    lines = code_lines(400)
    lines += ["    16: 'x'\n", "a  12   3\n", "\t\t1\r\n\r\n", "naïve 你好 😀 'll 'LL\n", "x = 0x1F + 1_000\n"]
    for text in [*lines, "".join(lines)]:
        assert default_tokenizer.encode(text) == default_oracle(text, add_special_tokens=False)["input_ids"]


def test_text_survives(default_tokenizer: Tokenizer, default_oracle) -> None:
    text = "".join(code_lines(200, seed=1)) + "naïve 你好 😀\n"
    ids = default_tokenizer.encode(text)
    assert default_tokenizer.decode(ids) == text == default_oracle.backend_tokenizer.decode(ids)


def test_control_tokens_of_the_default_model(default_tokenizer: Tokenizer) -> None:
    assert default_tokenizer.control_tokens["<|im_end|>"] == 2
    assert default_tokenizer.encode("<|im_end|>") == [2]
    plain = default_tokenizer.encode("<|im_end|>", control=False)
    assert 2 not in plain
    assert default_tokenizer.decode(plain) == "<|im_end|>"
    assert default_tokenizer.decode([*plain, 2]) == "<|im_end|>"  # control tokens add no text


@given(TEXTS)
def test_plain_text_never_becomes_a_control_token(text: str) -> None:
    ids = TINY.encode(text, control=False)
    assert not set(ids) & set(TINY.control_tokens.values())
    assert TINY.decode(ids) == text


@given(st.lists(TEXTS, max_size=4))
@settings(max_examples=300)
def test_marked_texts_in_a_template_equal_segments_encoded_apart(texts: list[str]) -> None:
    rendered, expected = "", []
    for text in texts:
        rendered += "<|im_start|>user\n" + TINY.mark_control(text, MARK) + "<|im_end|>"
        between = TINY.encode("user\n" + text, control=False)
        expected += [tiny.IM_START, *between, tiny.IM_END]
    assert TINY.encode_marked(rendered, MARK) == expected


@given(TEXTS, TEXTS)
def test_a_template_cannot_complete_what_a_user_began(left: str, right: str) -> None:
    rendered = TINY.mark_control(left, MARK) + TINY.mark_control(right, MARK)
    assert not set(TINY.encode_marked(rendered, MARK) if MARK in rendered else []) & set(TINY.control_tokens.values())
    assert MARK in rendered or "<|im_end|>" not in rendered


def test_qwens_unmarked_control_tokens_are_control_tokens() -> None:
    definition = tiny.tokenizer_json()
    for token in definition["added_tokens"]:
        token["special"] = False
    assert set(Tokenizer(definition).control_tokens) == set(tiny.SPECIAL_TOKENS)


def test_bos_comes_once(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.encode("x", bos=True) == [tiny.IM_START, *tiny_tokenizer.encode("x")]
    assert tiny_tokenizer.encode("<|im_start|>x", bos=True) == tiny_tokenizer.encode("<|im_start|>x")
    assert tiny_tokenizer.encode("", bos=True) == [tiny.IM_START]
    without = Tokenizer(tiny.tokenizer_json(), bos_token="<|im_start|>", add_bos=False)
    assert without.encode("x", bos=True) == without.encode("x")


def test_bos_of_a_post_processor_is_found() -> None:
    definition = tiny.tokenizer_json()
    bos = {"id": "<|im_start|>", "type_id": 0}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [tiny.IM_START], "tokens": ["<|im_start|>"]}},
    }
    tokenizer = Tokenizer(definition)
    assert tokenizer.bos_id == tiny.IM_START and tokenizer.add_bos
    assert tokenizer.encode("x", bos=True)[0] == tiny.IM_START


def test_offsets_are_places_in_the_text(tiny_tokenizer: Tokenizer) -> None:
    text = "def f(é): return 😀<|im_end|>"
    encoding = tiny_tokenizer.encode_with_offsets(text, bos=True)
    assert encoding.ids == tiny_tokenizer.encode(text, bos=True)
    assert encoding.offsets[0] == (0, 0)
    assert text[slice(*encoding.offsets[1])] == "def"
    assert text[slice(*encoding.offsets[-1])] == "<|im_end|>"
    assert len(encoding.offsets) == len(encoding.ids)


def test_ids_beyond_the_vocabulary_add_nothing(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.decode([*tiny_tokenizer.encode("ab"), 10**6, -1]) == "ab"


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json.*--tokenizer"):
        load_tokenizer(Checkpoint("x", folder=tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "?"}}')
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(Checkpoint("x", folder=tmp_path))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(tiny.tokenizer_json() | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    )
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        load_tokenizer(Checkpoint("x", folder=tmp_path))


def test_texts_of_neighbours_across_strips_stay_apart() -> None:
    definition = tiny.tokenizer_json()
    definition["added_tokens"][2]["rstrip"] = True  # <|im_end|> swallows the blanks after it
    tokenizer = Tokenizer(definition)
    whole = "a<|im_end|> \n<|im_start|>b"
    marked = tokenizer.mark_control("<|im_end|>", MARK) + whole
    plain = tokenizer.encode("<|im_end|>a", control=False)
    assert tokenizer.encode_marked(marked, MARK) == plain + tokenizer.encode(whole)[1:]


def test_many_control_tokens_and_long_texts_cost_little() -> None:
    """A quarter of a million angle brackets against five hundred control tokens: one step each, not five hundred."""
    definition = tiny.tokenizer_json()
    flags = {key: value for key, value in definition["added_tokens"][0].items() if key not in ("id", "content")}
    for number in range(500):
        content = f"<|reserved_{number}|>"
        definition["model"]["vocab"][content] = tiny.VOCAB_SIZE + number
        definition["added_tokens"].append({"id": tiny.VOCAB_SIZE + number, "content": content, **flags})
    tokenizer = Tokenizer(definition)
    assert tokenizer.encode("<|reserved_499|>") == [tiny.VOCAB_SIZE + 499]
    text = "<|reserved_77|>" + "<" * 250_000 + "|reserved_7|>"
    steps = len(tokenizer._control_starts.pattern)
    assert steps < 500 * 12, "common beginnings must be shared"
    marked = tokenizer.mark_control(text, MARK)
    assert marked.count(MARK) == 2 and marked.replace(MARK, "") == text
    assert tokenizer.encode_marked(marked, MARK) == tokenizer.encode(text, control=False)
