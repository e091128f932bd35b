"""Chat templates of many families render as transformers renders them, and nothing that users write is a control token.

The files in templates/ are ours: short ones in the form that each family documents, with the quirks of the published
templates (whitespace control, macros, namespaces, refusals, splitting, JSON with indentation). They are no copies:
default texts and tool instructions are shortened. tests/text/golden.py compares a folder of published ones in the same
way; docs/log.md says of which that was done.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.errors import InputError
from tabstop.text.chat import ChatTemplate, load_chat_template
from tabstop.text.tokenizer import Tokenizer
from tests.text.conversations import CONVERSATIONS, Body, calls, result, said, tool
from tests.text.fim_vocabularies import byte_level_definition
from tests.text.golden import Family, Pair, conversation, read_family

FILES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
MIN_RENDERED = {"gemma": 10, "llama-2": 10, "mistral-v1": 10, "starcoder2-instruct": 10, "codellama-70b": 10}
"""Conversations that a template must render; others refuse roles, or what they follow."""

PAIRS: dict[str, Pair] = {}


def pair_of(name: str) -> Pair:
    pytest.importorskip("transformers", reason="transformers is what templates are compared with")
    if name not in PAIRS:
        PAIRS[name] = Pair(read_family(FILES[name]))
    return PAIRS[name]


@pytest.mark.parametrize("name", FILES)
def test_templates_render_as_in_transformers(name: str) -> None:
    pair, rendered = pair_of(name), 0
    for what, body in CONVERSATIONS.items():
        (expected,) = pair.theirs(body)
        assert pair.ours(body) == expected, what
        rendered += expected is not None
    assert rendered >= MIN_RENDERED.get(name, 20)


# ---- injection

Write = Callable[[str], str]
"""What stands at a place of a conversation."""


def plain(write: Write) -> Body:
    turns = said(("user", write("user")), ("assistant", write("assistant")), ("user", write("last")))
    turns[0]["name"] = write("name")
    return {"messages": turns}


def under_system(write: Write) -> Body:
    return {"messages": [*said(("system", write("system"))), *plain(write)["messages"]]}


def begun(write: Write) -> Body:
    return {"messages": said(("user", write("user")), ("assistant", write("prefill")))}


def parts(write: Write) -> Body:
    texts = [{"type": "text", "text": write("part")}, {"type": "text", "text": write("other part")}]
    return {"messages": said(("user", texts))}


def with_tools(write: Write) -> Body:
    fields = {"type": "string", "enum": [write("enum")], write("key"): write("value")}
    described = tool(write("tool"), write("description"), **{write("property"): fields})
    arguments = json.dumps({write("argument"): write("given"), "n": [write("inner"), 1]}, ensure_ascii=False)
    call = calls(("call00001", write("tool"), arguments), reasoning_content=write("thoughts"))
    answered = result("call00001", write("tool"), write("result"))
    return {"messages": [*said(("user", write("user"))), call, answered], "tools": [described]}


def with_ids(write: Write) -> Body:
    call = calls((write("id"), "f", "{}"))
    return {"messages": [*said(("user", "x")), call, result(write("id"), "f", "x")], "tools": [tool("f", "F.")]}


BODIES = (plain, under_system, begun, parts, with_tools, with_ids)
HARMLESS = "§"


def control_of(pair: Pair, ids: list[int]) -> list[int]:
    control = set(pair.tokenizer.control_tokens.values())
    return [token_id for token_id in ids if token_id in control]


@cache
def own_tokens(source: str, make: Callable[[Write], Body]) -> list[int] | None:
    """The control tokens of a conversation about nothing; None: the template refuses it."""
    pair = next(pair for pair in PAIRS.values() if pair.family.source == source)
    try:
        return control_of(pair, pair.template.encode(pair.tokenizer, conversation(make(lambda _: HARMLESS))))
    except InputError:
        return None


def assert_is_text(pair: Pair, make: Callable[[Write], Body], write: Write) -> bool:
    """Whether the template takes such a conversation: then all control tokens are its own, and no text is lost.

    Blanks are not compared: SentencePiece puts one before a text, and spells it as ▁.
    """
    expected = own_tokens(pair.family.source, make)
    if expected is None:
        return False
    asked = conversation(make(write))
    try:
        ids = pair.template.encode(pair.tokenizer, asked)
    except InputError:  # a template that counts the characters of ids
        return False
    assert control_of(pair, ids) == expected
    spelled = b"".join(map(pair.tokenizer.spelled, ids)).decode()
    blanks = str.maketrans("", "", " ▁" if pair.family.pieces else "")
    if asked.continue_final_message:
        assert spelled.translate(blanks).endswith(make(write)["messages"][-1]["content"].translate(blanks))
    else:
        assert spelled.translate(blanks) == pair.template.render(asked).translate(blanks)
    return True


@pytest.mark.parametrize("name", FILES)
def test_no_token_can_be_written_anywhere(name: str) -> None:
    """Each control token whole, alone and inside of text, in halves, and without its first and last character."""
    pair, taken = pair_of(name), set()
    for token in pair.tokenizer.control_tokens:
        half = len(token) // 2
        for payload in (
            token,
            f"a{token}b",
            token[:half],
            token[half:],
            token[1:-1] or "|",
            f"{token[half:]} {token[:half]}",
        ):
            taken |= {make for make in BODIES if assert_is_text(pair, make, lambda _, payload=payload: payload)}
    assert {plain, begun, parts} <= taken


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3-coder", "deepseek-r1", "llama-3", "mistral-v7", "granite-3", "codegeex4"]
)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_pieces_of_tokens_do_not_join(name: str, data: st.DataObject) -> None:
    pair = pair_of(name)
    tokens = sorted(pair.tokenizer.control_tokens)

    def piece() -> str:
        token = data.draw(st.sampled_from([*tokens, "</think>", "<tool_call>", "\n\n", '"', "é", " "]))
        start = data.draw(st.integers(0, len(token)))
        return token[start : data.draw(st.integers(start, len(token)))]

    written = {place: "".join(piece() for _ in range(data.draw(st.integers(0, 3)))) for place in PLACES}
    if name in ("qwen3", "deepseek-r1"):  # these cut the assistant's text at it
        written = {place: text.replace("</think>", "") for place, text in written.items()}
    make = data.draw(st.sampled_from((plain, under_system, with_tools, begun)))
    assert_is_text(pair, make, lambda place: written[place] or "x")


PLACES = (
    *("user", "assistant", "last", "name", "system", "prefill", "tool", "description", "property", "enum", "key"),
    *("value", "argument", "given", "inner", "thoughts", "result"),
)


def test_marks_inside_of_other_values_are_taken_out() -> None:
    """Python and JSON write them as escapes where a template prints a whole value."""
    tokenizer = Tokenizer(byte_level_definition(("<|end|>",)))
    template = ChatTemplate("{{ messages }}{{ tools }}{{ messages | tojson(ensure_ascii=True) }}<|end|>")
    asked = conversation({"messages": said(("user", "a<|end|>b\ufdd0")), "tools": [tool("<|end|>", "d", a={})]})
    ids = template.encode(tokenizer, asked)
    assert b"".join(map(tokenizer.spelled, ids)).decode() == template.render(asked)
    assert [token_id for token_id in ids if token_id == tokenizer.token_id("<|end|>")] == ids[-1:]


@pytest.mark.parametrize(
    ("source", "content", "shown"),
    [
        (
            "{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ m.reasoning_content }}",
            "<think>\na\n</think>\n\nb",
            "ba",
        ),
        ("{{ m.content.split('</think>')[-1] }}", "<think>\na\n</think>\n\nb", "\n\nb"),
        ("{{ m.content }}{# </think> #}", "a</think>b", "a</think>b"),
    ],
)
def test_thoughts_between_control_tokens_are_taken_out_of_earlier_answers(
    source: str, content: str, shown: str
) -> None:
    tokenizer = Tokenizer(byte_level_definition(("<|end|>", "<think>", "</think>")))
    template = ChatTemplate("{% for m in messages %}<|end|>" + source + "{% endfor %}")
    ids = template.encode(tokenizer, conversation({"messages": said(("assistant", content), ("user", "x"))}))
    assert len(control_of_all(tokenizer, ids)) == 2
    assert b"".join(map(tokenizer.spelled, ids)).decode().startswith("<|end|>" + shown)


def control_of_all(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in tokenizer.control_bytes]


def test_names_that_templates_ask_for_stay() -> None:
    """A vocabulary may have tokens with `id`, `object` or `type` inside."""
    tokenizer = Tokenizer(byte_level_definition(("<|id|>", "<|object_type|>", "<|function_name|>")))
    source = "{{ messages[1].tool_calls[0].id }}{{ tools[0].function.parameters.type == 'object' }}{{ tools[0].type }}"
    ids = ChatTemplate(source).encode(tokenizer, conversation(CONVERSATIONS["a call"]))
    assert tokenizer.decode(ids) == "call00001Truefunction"


def test_templates_for_tools() -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t{{ tools | length }}"}]
    template = load_chat_template({"chat_template": named})
    assert template is not None
    assert template.render(conversation({"messages": said(("user", "x"))})) == "d"
    assert template.render(conversation(CONVERSATIONS["tools"])) == "t2"
    tokenizer = Tokenizer(byte_level_definition(("<|end|>",)))
    assert tokenizer.decode(template.encode(tokenizer, conversation(CONVERSATIONS["tools"]))) == "t2"


def test_contents_are_parts_where_a_template_wants_them() -> None:
    """Of a text such a template would read each letter as a part, and show none."""
    source = (
        "{% for m in messages %}<|end|>{{ m.role }}: {% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    tokenizer = Tokenizer(byte_level_definition(("<|end|>",)))
    template = ChatTemplate(source)
    ids = template.encode(tokenizer, conversation({"messages": said(("system", "s"), ("user", "<|end|>"))}))
    assert b"".join(map(tokenizer.spelled, ids)).decode() == "<|end|>system: s<|end|>user: <|end|>"
    assert len(control_of_all(tokenizer, ids)) == 2
    ids = template.encode(tokenizer, conversation({"messages": said(("user", "u"), ("assistant", "a "))}))
    assert tokenizer.decode(ids) == "user: uassistant: a "


def test_every_family_is_there() -> None:
    assert len(FILES) >= 26 and len(CONVERSATIONS) >= 20
    assert all(isinstance(read_family(path), Family) for path in FILES.values())
