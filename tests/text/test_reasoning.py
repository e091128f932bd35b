"""Reasoning and answer are told apart alike however the text is cut; the prompt's end says where reasoning begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabstop.errors import ConfigError, InputError, NotSupportedError
from tabstop.grammar.specs import Thinking
from tabstop.text.chat import ChatTemplate, Conversation
from tabstop.text.messages import make_conversation, read_messages, read_switches
from tabstop.text.reasoning import STYLES, ReasoningReader, find_reasoning, split_reasoning, thinking_in
from tabstop.text.tokenizer import Tokenizer
from tests.text.fim_vocabularies import byte_level_definition

CLOSED, OPEN = Thinking("<think>", "</think>", False), Thinking("<think>", "</think>", True)
PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "think>", "</", "\n", "\r\n", " ", "a", "é", "</thin", "<|"]),
    max_size=12,
).map("".join)

CASES = [
    ("<think>\nLet me see.\n</think>\n\nx = 1\n", False, "Let me see.", "x = 1\n"),
    ("\n <think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\n  b", False, "", "  b"),
    ("a\n\nb</think>c</think>d", True, "a\n\nb", "c</think>d"),
    ("no thoughts <think>a</think>", False, "", "no thoughts <think>a</think>"),
    ("  <thin", False, "", "  <thin"),
    ("<think>cut </thi", False, "cut </thi", ""),
    ("cut\n", True, "cut\n", ""),
    ("", True, "", ""),
    ("</think>\n", True, "", ""),
    ("\n\na<think>b</think>", True, "a<think>b", ""),
]


@pytest.mark.parametrize(("text", "is_open", "reasoning", "answer"), CASES)
def test_whole_texts(text: str, is_open: bool, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, OPEN if is_open else CLOSED) == (reasoning, answer)


@pytest.mark.parametrize(("text", "is_open", "reasoning", "answer"), CASES)
def test_every_cut_gives_the_whole(text: str, is_open: bool, reasoning: str, answer: str) -> None:
    for pieces in (*([text[:cut], text[cut:]] for cut in range(len(text))), list(text)):
        reader = ReasoningReader(OPEN if is_open else CLOSED)
        told = [reader.feed(piece) for piece in pieces] + [reader.feed("", is_last=True)]
        assert tuple(map("".join, zip(*told, strict=True))) == (reasoning, answer)


@given(st.lists(PIECES, max_size=12), st.booleans())
def test_any_pieces_give_the_whole(pieces: list[str], is_open: bool) -> None:
    thinking = OPEN if is_open else CLOSED
    reader = ReasoningReader(thinking)
    told = [reader.feed(piece) for piece in pieces] + [reader.feed("", is_last=True)]
    whole = split_reasoning("".join(pieces), thinking)
    assert tuple(map("".join, zip(*told, strict=True))) == whole
    assert "".join(whole).strip() in "".join(pieces) or "</think>" in "".join(pieces) or "<think>" in "".join(pieces)


@given(PIECES, PIECES)
def test_nothing_but_tags_and_line_ends_is_lost(reasoning: str, answer: str) -> None:
    reasoning, answer = reasoning.replace("</think>", ""), answer.lstrip("\r\n")
    if "</think>" in reasoning:
        return
    told = split_reasoning(f"<think>{reasoning}\n</think>\n\n{answer}", CLOSED)
    assert told == (reasoning.strip("\r\n"), answer)


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    reader = ReasoningReader(CLOSED)
    assert [reader.feed(piece) for piece in ("<th", "ink>\na", "b\n<", "i", "\n</think", ">", "\nc", "<think>")] == [
        *(("", ""), ("a", ""), ("b", ""), ("\n<i", ""), ("", ""), ("", ""), ("", "c"), ("", "<think>")),
    ]


def test_the_template_tells_the_style() -> None:
    for style in STYLES.values():
        assert find_reasoning("auto", f"{{% if x %}}{style.end}{{% endif %}}") == style
        assert find_reasoning(style.name, None) == style
    assert find_reasoning("auto", "{{ messages }}") is None and find_reasoning("auto", None) is None
    assert find_reasoning("off", "</think>") is None
    with pytest.raises(ConfigError, match=r"--reasoning is 'x'; choose one of auto, off, think"):
        find_reasoning("x", None)


@pytest.mark.parametrize("marked", [True, False])
def test_the_prompt_tells_where_reasoning_begins(marked: bool) -> None:
    """`marked`: the tags are control tokens."""
    tokenizer = Tokenizer(byte_level_definition(("<|user|>", "<think>", "</think>"), marked=marked))
    style = STYLES["think"]

    def thinking(prompt: str, begun: str = "") -> Thinking | None:
        return thinking_in(style, tokenizer, tokenizer.encode(prompt), begun)

    start_id, end_id = (tokenizer.token_id("<think>"), tokenizer.token_id("</think>")) if marked else (None, None)
    open_, closed = (Thinking("<think>", "</think>", is_open, start_id, end_id) for is_open in (True, False))
    assert thinking("<|user|>hi\n") == closed
    assert thinking("<|user|>hi\n<think>\n") == open_
    assert thinking("<|user|>hi\n<think>\n\n</think>\n\n") is None
    assert thinking("<|user|>hi\n<think>\nSo", "<think>\nSo") == open_
    assert thinking("<|user|>hi\n<think>a</think>x", "<think>a</think>x") is None
    assert thinking("<|user|>hi\nx =", "x =") is None
    assert thinking("<|user|>hi\n<think>", "") == open_
    assert thinking_in(None, tokenizer, tokenizer.encode("<think>"), "") is None


SHOWS = ChatTemplate("{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}]{% endfor %}")


@pytest.mark.parametrize(
    "message",
    [
        {"content": "c", "reasoning_content": "r"},
        {"content": "c", "reasoning": "r"},
        {"content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "c"}]},
        {"content": [{"type": "reasoning", "text": "r"}, {"type": "output_text", "text": "c"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}, {"text": "c"}]},
    ],
)
def test_earlier_thoughts_reach_the_template(message: dict) -> None:
    bodies = read_messages([{"role": "assistant"} | message, {"role": "user", "content": "u"}])
    assert SHOWS.render(make_conversation(bodies)) == "[r|r|c][||u]"


def test_only_the_assistant_thinks() -> None:
    bodies = read_messages([{"role": "user", "content": "u", "reasoning_content": "r"}])
    assert SHOWS.render(make_conversation(bodies)) == "[||u]"
    part = {"type": "thinking", "thinking": "r"}
    with pytest.raises(NotSupportedError, match="not text"):
        make_conversation(read_messages([{"role": "user", "content": [part]}]))


def test_switches() -> None:
    assert read_switches(None) == {} == read_switches({"enable_thinking": None})
    given = {"enable_thinking": False, "thinking": True, "reasoning_effort": "high"}
    assert read_switches(given) == given
    assert read_switches(None, "low") == {"reasoning_effort": "low"}
    assert read_switches({"reasoning_effort": "high"}, "low") == {"reasoning_effort": "high"}
    off = {"enable_thinking": False, "thinking": False, "reasoning_effort": "none"}
    assert read_switches(None, "none") == off
    assert read_switches({"thinking": True}, "none") == off | {"thinking": True}
    template = ChatTemplate("{{ enable_thinking }}{{ thinking is defined }}{{ messages[0].content }}")
    assert template.render(Conversation([{"role": "user", "content": "u"}], switches={"enable_thinking": False})) == (
        "FalseFalseu"
    )


@pytest.mark.parametrize(
    "name", ["messages", "tools", "chat_template", "tokenize", "add_generation_prompt", "bos_token", "documents", "x"]
)
def test_other_variables_are_refused(name: str) -> None:
    """CVE-2025-62426, CVE-2025-61620: with these a request replaced the template, or stalled its renderer."""
    with pytest.raises(NotSupportedError, match="takes enable_thinking, thinking, reasoning_effort; nothing else"):
        read_switches({name: True})


@pytest.mark.parametrize(
    "given", [{"enable_thinking": "x" * 9}, {"thinking": 1}, {"reasoning_effort": "<|x|>"}, {"thinking": [True]}, [1]]
)
def test_switches_have_their_values(given: object) -> None:
    with pytest.raises(InputError, match="must be"):
        read_switches(given)
