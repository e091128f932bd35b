from __future__ import annotations

import json
from typing import Any

import pytest

from tabstop.text.chat import ChatTemplate, Conversation
from tabstop.text.tokenizer import Tokenizer
from tests import tiny

TINY = Tokenizer(tiny.tokenizer_json(), bos_token="<|im_start|>")

# In the manner of Qwen, of DeepSeek R1, of a template that adds texts, and of one that prints whatever there is.
OBJECTS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endfor %}"
)
NONE = (
    "{% for m in messages %}{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ c.function.name + '=' + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TEXTS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
    "{{ c.function.name ~ '=' ~ c.function.arguments }}{% endfor %}{% endfor %}"
)
ITEMS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
    "{% for key, value in c.function.arguments.items() %}<{{ key | tojson }}:{{ value | tojson }}>{% endfor %}"
    "{% endfor %}{% endfor %}"
)


STRICT_IDS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('length 9') }}{% endif %}{{ {'f': c.function, 'id': c.id} | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('length 9') }}{% endif %}"
    "={{ m.tool_call_id }}{% endif %}{% endfor %}"
)


def called(arguments: Any) -> Conversation:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}])


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (OBJECTS, '?{"name": "f", "arguments": {"a": "é"}}'),
        (NONE, '?f={"a":"é"}'),
        (TEXTS, '?f={"a":"é"}'),
        (ITEMS, '?f<"a":"é">'),
    ],
)
def test_each_template_gets_calls_as_it_wants_them(template: str, shown: str) -> None:
    assert ChatTemplate(template).render(called('{"a":"é"}')) == shown
    assert ChatTemplate(template).render(called({"a": "é"})) == shown.replace(":", ": ") if "=" in shown else shown


@pytest.mark.parametrize("arguments", ["", "{", "[1]", '"x"', None, [1], "null", "[" * 5000, '{"a": "\\ud800"}'])
@pytest.mark.parametrize("template", [OBJECTS, NONE, TEXTS, ITEMS])
def test_a_models_mistake_costs_no_conversation(template: str, arguments: Any) -> None:
    shown = ChatTemplate(template).render(called(arguments))
    assert shown.startswith("?") and shown.encode()


def test_mistakes_are_shown_as_objects() -> None:
    shown = ChatTemplate(OBJECTS).render(called('{"a": '))
    assert json.loads(shown[1:])["arguments"] == {"arguments": '{"a": '}
    assert json.loads(ChatTemplate(OBJECTS).render(called(""))[1:])["arguments"] == {}


def test_calls_that_are_no_calls_are_the_templates_business() -> None:
    conversation = Conversation([{"role": "assistant", "content": "x", "tool_calls": [3, {"function": 4}]}])
    assert ChatTemplate(TEXTS.replace(".name", "").replace(".arguments", "")).render(conversation) == "x=4=4"


def test_tools_reach_the_template_and_spell_no_control_tokens() -> None:
    template = ChatTemplate("{{ tools | tojson }}<|im_end|>{{ messages[0].content }}")
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>", "<|im_start|>": 1}}]
    conversation = Conversation([{"role": "user", "content": "?"}], tools=tools)
    assert template.render(conversation) == json.dumps(tools) + "<|im_end|>?"
    ids = template.encode(TINY, conversation)
    assert ids.count(tiny.IM_END) == 1 and tiny.IM_START not in ids
    assert TINY.decode(ids) == json.dumps(tools) + "?"


def test_no_tools_are_none() -> None:
    template = ChatTemplate("{{ tools is none }}")
    for tools in (None, []):
        assert template.render(Conversation([{"role": "user", "content": "?"}], tools=tools)) == "True"


def test_ids_are_as_short_as_a_template_wants_them() -> None:
    """Those of a call and of its result stay the same."""
    template = ChatTemplate(STRICT_IDS)
    for name in ("call_0123456789abcdef01234567", "x", "abcdefgh9", "ü" * 9):
        call = {"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
        messages = [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": name},
        ]
        shown, _, result = template.render(Conversation(messages)).partition("=")
        short = json.loads(shown)["id"]
        assert short == result and len(short) == 9 and short.isascii() and short.isalnum()
        assert (short == name) is (name == "abcdefgh9")
    long = "call_0123456789abcdef01234567"
    assert json.loads(ChatTemplate(STRICT_IDS.replace("!= 9", "< 9")).render(called_by(long))[1:])["id"] == long


def called_by(name: str) -> Conversation:
    call = {"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    return Conversation([{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}])


def test_templates_that_know_no_results_are_asked_without() -> None:
    refuses = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + NONE
    assert ChatTemplate(refuses).render(called('{"a":"é"}')) == '?f={"a":"é"}'
