"""The two pure directions of OpenAI's dialect: body → Call, delta → bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tabstop.api.chunks import ChatFormat
from tabstop.api.dialects.openai import ChatBody, CompletionBody, CompletionFormat, chat_call, completion_call
from tabstop.api.fields import Caller
from tabstop.api.schema import Refused, decode_body
from tabstop.call import Call, TextDelta, TextPrompt, TokenPrompt, Usage
from tabstop.errors import InputError, NotSupportedError, UnavailableError
from tabstop.text.chat import Conversation
from tabstop.types import FinishReason, Priority

CALLER = Caller("id", "tenant")


def completion(caller: Caller = CALLER, **body: Any) -> Call:
    return completion_call(decode_body(json.dumps({"prompt": "x"} | body).encode(), CompletionBody), caller)


def chat(*messages: dict[str, Any], caller: Caller = CALLER, **body: Any) -> Call:
    body = {"messages": messages or [{"role": "user", "content": "hi"}]} | body
    return chat_call(decode_body(json.dumps(body).encode(), ChatBody), caller)


# ---- body → Call


def test_every_field_of_a_completion() -> None:
    call = completion(
        model="m", max_tokens=7, min_tokens=2, temperature=0.5, top_k=-1, top_p=0.9, seed=3, n=2, stop=["a", "b", "a"],
        stop_token_ids=[4], ignore_eos=True, echo=True, include_stop_str_in_output=True, priority="interactive",
        deadline_ms=100, session="s", cache_salt="c", cache={"read": False, "retain": False}, add_special_tokens=False,
        options={"num_predict": 3}, keep_alive=1800,
    )  # fmt: skip
    assert call == Call(
        prompts=(TextPrompt("x", bos=False),), model="m", request_id="id", tenant="tenant", temperature=0.5, top_k=0,
        top_p=0.9, seed=3, num_samples=2, max_tokens=7, default_max_tokens=16, min_tokens=2, stop_strings=("a", "b"),
        stop_token_ids=(4,), ignore_eos=True, keep_stop_string=True, echo=True, priority=Priority.INTERACTIVE,
        deadline_ms=100, session="s", cache_salt="c", cache_read=False, cache_retain=False,
    )  # fmt: skip


def test_nulls_are_absent() -> None:
    names = [name for name in CompletionBody.__struct_fields__ if name != "prompt"]
    assert completion(**dict.fromkeys(names)) == completion()
    names = [name for name in ChatBody.__struct_fields__ if name != "messages"]
    assert chat(**dict.fromkeys(names)) == chat()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", (TextPrompt("a"),)),
        ("", (TextPrompt(""),)),
        (["a", "b"], (TextPrompt("a"), TextPrompt("b"))),
        ([1, 2], (TokenPrompt([1, 2]),)),
        ([[1], [2, 3]], (TokenPrompt([1]), TokenPrompt([2, 3]))),
    ],
)
def test_prompt_forms(prompt: Any, expected: tuple[Any, ...]) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [1, "a"], [[1], "a"], ["a"] * 1025, [[1]] * 1025])
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(InputError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_chat_fields() -> None:
    assert chat(max_tokens=3).max_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert chat().max_tokens is None and chat().default_max_tokens is None
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    (prompt,) = chat({"role": "developer", "content": parts, "name": "n"}).prompts
    assert prompt == Conversation([{"role": "developer", "content": "ab", "name": "n"}])
    (prompt,) = chat({"role": "tool", "content": None, "tool_call_id": "7"}).prompts
    assert prompt.messages == [{"role": "tool", "content": "", "tool_call_id": "7"}]


def test_prefill() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert chat(user, assistant).prompts[0].continue_final_message
    assert chat(user, assistant | {"prefix": True}).prompts[0].continue_final_message
    assert not chat(user, assistant, continue_final_message=False).prompts[0].continue_final_message
    assert not chat(user).prompts[0].continue_final_message
    assert not chat(user, add_generation_prompt=False).prompts[0].add_generation_prompt
    with pytest.raises(InputError, match="only a last message of the assistant"):
        chat(user | {"prefix": True})


def test_unknown_roles_and_parts_are_refused() -> None:
    with pytest.raises(InputError, match=r"messages\[1\].role"):
        chat({"role": "user", "content": "a"}, {"role": "wizard", "content": "b"})
    with pytest.raises(NotSupportedError, match="not text"):
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]})


def test_headers_say_what_the_body_does_not() -> None:
    headers = {"x-priority": "background", "x-deadline-ms": "250", "x-session-id": "h"}
    call = completion(Caller(headers=headers))
    assert (call.priority, call.deadline_ms, call.session) == (Priority.BACKGROUND, 250, "h")
    call = completion(Caller(headers=headers), priority="normal", timeout=1.5, user="u")
    assert (call.priority, call.deadline_ms, call.session) == (Priority.NORMAL, 1500, "u")
    assert completion(prompt_cache_key="k", user="u").session == "k"
    for header in ("-1", "0", "1e3", "٣", "9" * 30, ""):
        with pytest.raises(InputError) as caught:
            completion(Caller(headers={"x-deadline-ms": header}))
        assert caught.value.param == "deadline_ms"
    with pytest.raises(InputError, match="interactive, normal or background"):
        completion(priority="urgent")


def test_top_p_zero_is_greedy() -> None:
    assert completion(top_p=0, temperature=1).temperature == 0.0


REFUSED: dict[str, Any] = {
    "guided_whitespace_pattern": " ", "use_beam_search": True, "length_penalty": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_parameters_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotSupportedError, match=name) as caught:
        completion(**{name: REFUSED[name]})
    assert caught.value.param == name and caught.value.status == 400


CHAT_REFUSED: dict[str, Any] = {
    "chat_template": "{{ x }}", "function_call": {"name": "f"},
    "functions": [{"name": "f"}], "modalities": ["text", "audio"], "documents": [{"x": 1}],
    "chat_template_kwargs": {"messages": []}, "echo": True,
}  # fmt: skip


@pytest.mark.parametrize("name", CHAT_REFUSED)
def test_unsupported_parameters_of_chats_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotSupportedError, match=name) as caught:
        chat(**{name: CHAT_REFUSED[name]})
    assert caught.value.param == name


def test_values_that_ask_for_nothing_are_fine() -> None:
    neutral = {
        "logprobs": False, "best_of": 2, "n": 2, "logit_bias": {}, "presence_penalty": 0, "min_p": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "response_format": {"type": "text"},
        "use_beam_search": False,
        "skip_special_tokens": True,
    }  # fmt: skip
    assert completion(**neutral).num_samples == 2
    chat(tools=[], tool_choice="auto", modalities=["text"], logprobs=False, parallel_tool_calls=True, store=True)
    chat(functions=[], function_call="auto")
    assert set(REFUSED) <= set(Refused.__struct_fields__)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"logprobs": 3}, None),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 0}, 0),
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": 2, "logprobs": 5}, 2),
        ({"prompt_logprobs": 2, "echo": True, "logprobs": 5}, 5),
        ({"prompt_logprobs": 5, "echo": True, "logprobs": 2}, 5),
    ],
)
def test_a_prompt_is_reported_where_it_is_shown(given: dict[str, Any], expected: int | None) -> None:
    assert completion(**given).num_prompt_reported == expected


def test_what_changes_a_draw_reaches_the_call() -> None:
    call = completion(
        min_p=0.1, typical_p=0.9, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=-1, logprobs=3,
        logit_bias={"5": -1.5, "6": 2, "7": False}, allowed_token_ids=[1, 2], bad_words=["x"],
        skip_special_tokens=False, truncate_prompt_tokens=-1,
    )  # fmt: skip
    assert (call.min_p, call.typical_p, call.repetition_penalty) == (0.1, 0.9, 1.1)
    assert (call.presence_penalty, call.frequency_penalty) == (0.5, -1)
    assert (call.logit_bias, call.banned_ids) == (((5, -1.5), (6, 2.0)), (7,))
    assert (call.allowed_token_ids, call.bad_words, call.show_control) == ((1, 2), ("x",), True)
    assert (call.truncate_prompt, call.num_logprobs) == (0, 3)
    assert completion(truncate_prompt_tokens=5).truncate_prompt == 5
    assert chat(logprobs=True).num_logprobs == 0 and chat(logprobs=True, top_logprobs=20).num_logprobs == 20
    assert chat().num_logprobs is completion(logprobs=False).num_logprobs is None


@pytest.mark.parametrize(
    ("make", "wrong", "param"),
    [
        ("completion", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("completion", {"logit_bias": {"1": 101}}, "logit_bias"),
        ("completion", {"logit_bias": {"1": True}}, "logit_bias"),
        ("completion", {"logprobs": True}, "logprobs"),
        ("completion", {"logprobs": 21}, "logprobs"),
        ("completion", {"logprobs": 1, "echo": True, "suffix": "x"}, "logprobs"),
        ("completion", {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("completion", {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ("chat", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("completion", {"n": 3, "best_of": 2}, "best_of"),
        ("completion", {"best_of": 2, "stream": True}, "best_of"),
        ("completion", {"presence_penalty": 2.1}, "presence_penalty"),
        ("completion", {"repetition_penalty": 0}, "repetition_penalty"),
        ("completion", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("chat", {"logprobs": 3}, "logprobs"),
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_draws_that_make_no_sense_are_refused_by_name(make: str, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises((InputError, NotSupportedError)) as caught:
        {"completion": completion, "chat": chat}[make](**wrong)
    assert caught.value.param == param and caught.value.status == 400


# ---- deltas → bytes


def fixed(form: Any) -> Any:
    form._base.update(id=form.id_prefix + "1", created=2)
    return form


USAGE = Usage(num_prompt_tokens=5, num_cached_tokens=4, num_completion_tokens=3)
USAGE_JSON = (
    b'"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8,"prompt_tokens_details":{"cached_tokens":4}}'
)


def test_golden_completion_stream() -> None:
    form = fixed(CompletionFormat("m", 1, include_usage=True))
    head = b'data: {"id":"cmpl-1","created":2,"model":"m","object":"text_completion","choices":['
    assert form.opening() == b""
    assert form.delta(TextDelta(0, 'é"\n', [1])) == (
        head + '{"index":0,"text":"é\\"\\n","logprobs":null,"finish_reason":null}]}\n\n'.encode()
    )
    assert form.delta(TextDelta(1, "", [2], FinishReason.STOP, "\n\n")) == (
        head + b'{"index":1,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":"\\n\\n"}]}\n\n'
    )
    assert form.closing(USAGE) == head + b"]," + USAGE_JSON + b"}\n\ndata: [DONE]\n\n"


def test_golden_chat_stream() -> None:
    form = fixed(ChatFormat("m", 2, include_usage=False))
    head = b'data: {"id":"chatcmpl-1","created":2,"model":"m","object":"chat.completion.chunk","choices":['
    opening = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
    assert form.opening() == head + opening % 0 + head + opening % 1
    content = b'{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}\n\n'
    assert form.delta(TextDelta(0, "a", [1])) == head + content
    finish = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
    assert form.delta(TextDelta(0, "a", [1], FinishReason.LENGTH)) == head + content + head + finish
    assert form.delta(TextDelta(0, "", [1])) == b""
    assert form.closing(USAGE) == b"data: [DONE]\n\n"


def test_golden_failure() -> None:
    event = ChatFormat("m", 1, include_usage=True).failure(UnavailableError("gone"))
    assert event == (
        b'data: {"error":{"message":"gone","type":"service_unavailable_error","param":null,"code":"unavailable"}}\n\n'
        b"data: [DONE]\n\n"
    )


def test_golden_whole_answers() -> None:
    choices = [TextDelta(0, "a", [1], FinishReason.STOP), TextDelta(1, "b", [2], FinishReason.DEADLINE)]
    assert fixed(CompletionFormat("m", 2, False)).whole(choices, USAGE) == (
        b'{"id":"cmpl-1","created":2,"model":"m","object":"text_completion","choices":['
        b'{"index":0,"text":"a","logprobs":null,"finish_reason":"stop"},'
        b'{"index":1,"text":"b","logprobs":null,"finish_reason":"length"}],' + USAGE_JSON + b"}"
    )
    assert fixed(ChatFormat("m", 1, False)).whole(choices[:1], USAGE) == (
        b'{"id":"chatcmpl-1","created":2,"model":"m","object":"chat.completion","choices":['
        b'{"index":0,"message":{"role":"assistant","content":"a"},"logprobs":null,"finish_reason":"stop"}],'
        + USAGE_JSON
        + b"}"
    )


def test_distinct_is_about_one_prompt() -> None:
    """Of several, choices that are alike vanished, and no index told whose."""
    assert completion(prompt=["a"], suffix="b", distinct=True).distinct
    with pytest.raises(InputError, match="distinct needs one prompt"):
        completion(prompt=["a", "a"], suffix="b", distinct=True)
