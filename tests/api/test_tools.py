"""Tools over a socket: a tiny real model that a grammar makes call, a scripted engine that answers as models do."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import openai
import pytest

from tabstop.api.dialects.openai import ChatBody, chat_call
from tabstop.api.fields import Caller
from tabstop.api.schema import decode_body
from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.engine.inproc import InprocClient
from tabstop.errors import InputError, NotSupportedError
from tabstop.text import DEFAULT_OPTIONS, TextOptions, load_text
from tabstop.text.chat import Conversation
from tabstop.text.tokenizer import load_tokenizer
from tabstop.tools import FORMATS, Function, ToolUse
from tabstop.tools.hermes import Hermes
from tabstop.types import Delta, Submit, unpack_ids
from tests import tiny
from tests.api.serving import EOS, Running, serving
from tests.tools.models import tool_model
from tests.tools.test_formats import CODER

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", 'São "Paulo"']},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "hourly": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 8},
        "at": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "days", "hourly", "note", "at"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now"}}
ASK = [{"role": "user", "content": "Weather?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(tool_model(tmp_path_factory.mktemp("tools") / "tiny")))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[InprocClient]:
    """Of the real model, shared by servers of all formats."""
    assert checkpoint.folder is not None
    client = InprocClient(build_core(EngineConfig(model=str(checkpoint.folder), num_threads=1, max_num_seqs=8)))
    yield client
    client.close()


@contextmanager
def client_of(server: Any) -> Iterator[openai.OpenAI]:
    with server as running, openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module", params=["auto", *(name for name in FORMATS if name != "hermes")])
def forced(request: pytest.FixtureRequest, checkpoint: Checkpoint, engine: InprocClient) -> Iterator[openai.OpenAI]:
    with client_of(serving(checkpoint, engine, options=TextOptions(tool_format=request.param))) as client:
        yield client


def settings(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASK, "temperature": 1, "seed": 7, "max_tokens": 1500} | more


def check_weather(arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMA)


NAMED = {"type": "function", "function": {"name": "get_weather"}}


def test_a_named_function_is_called_once_as_its_schema_says(forced: openai.OpenAI) -> None:
    """Whole and streamed, through OpenAI's own package; and no other function."""
    asked = settings(tools=[NOW, WEATHER], tool_choice=NAMED)
    (choice,) = forced.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather") and call.id.startswith("call_")
    check_weather(call.function.arguments)
    with forced.chat.completions.stream(**asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert events.count("tool_calls.function.arguments.delta") > 1
    assert final.finish_reason == "tool_calls" and not final.message.content
    (streamed,) = final.message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == ("get_weather", call.function.arguments)


def test_required_calls_in_several_samples(forced: openai.OpenAI) -> None:
    asked = settings(tools=[WEATHER, NOW], tool_choice="required", parallel_tool_calls=False, n=2, seed=3)
    answer = forced.chat.completions.create(**asked, logprobs=True)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls
        if call.function.name == "get_weather":
            check_weather(call.function.arguments)
        else:
            assert call.function.name == "now" and isinstance(json.loads(call.function.arguments), dict)
    assert sum(len(choice.logprobs.content) for choice in answer.choices) == answer.usage.completion_tokens


def test_parallel_calls(forced: openai.OpenAI) -> None:
    """Of a model that may not end: in most formats it has to go on, in others it goes on half of the time."""
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": empty}} for name in ("a", "b")]
    bias = {str(token): -100 for token in (tiny.IM_END, tiny.ENDOFTEXT)}
    asked = settings(tools=tools, tool_choice="required", n=4, max_tokens=120, logit_bias=bias)
    choices = forced.chat.completions.create(**asked).choices
    assert max(len(choice.message.tool_calls) for choice in choices) > 1
    for choice in choices:
        ids = [call.id for call in choice.message.tool_calls]
        assert len(set(ids)) == len(ids)
        assert {call.function.name for call in choice.message.tool_calls} <= {"a", "b"}


def test_a_call_that_is_cut_is_no_whole_one(forced: openai.OpenAI) -> None:
    asked = settings(tools=[WEATHER], tool_choice="required", max_tokens=45)
    (choice,) = forced.chat.completions.create(**asked).choices
    assert choice.finish_reason == "length"
    stream = list(forced.chat.completions.create(**asked, stream=True))
    pieces = [piece for chunk in stream for piece in chunk.choices[0].delta.tool_calls or ()]
    written = "".join(piece.function.arguments or "" for piece in pieces)
    whole = "".join(call.function.arguments for call in choice.message.tool_calls or ())
    assert written == whole and stream[-1].choices[0].finish_reason == "length"


# ---- what models say


@contextmanager
def saying(checkpoint: Checkpoint, *texts: str, options: TextOptions = DEFAULT_OPTIONS) -> Iterator[Running]:
    """A server whose samples say these texts, whatever they are asked."""
    tokenizer = load_tokenizer(checkpoint)
    script = scripted(*([*tokenizer.encode(text), EOS] for text in texts))
    fake = FakeEngine(script=script, stop_sets={"eos": frozenset([EOS])})
    with serving(checkpoint, fake, options=options) as running:
        yield running
        running.assert_idle()


def post(running: Running, **body: Any) -> dict[str, Any]:
    answer = httpx.post(running.url + "/v1/chat/completions", json={"messages": ASK} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(running: Running, **body: Any) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Choices as they add up, and all chunks."""
    choices: dict[int, dict[str, Any]] = {}
    chunks = []
    asked = {"messages": ASK, "stream": True} | body
    with httpx.stream("POST", running.url + "/v1/chat/completions", json=asked) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[6:]))
    for chunk in chunks:
        for new in chunk["choices"]:
            choice = choices.setdefault(new["index"], {"content": "", "calls": {}, "finish": None})
            choice["content"] += new["delta"].get("content") or ""
            choice["finish"] = new["finish_reason"] or choice["finish"]
            for piece in new["delta"].get("tool_calls", ()):
                call = choice["calls"].setdefault(piece["index"], {"name": "", "arguments": ""})
                call["name"] += piece["function"].get("name", "")
                call["arguments"] += piece["function"]["arguments"]
    return choices, chunks


HERMES = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": "3", "hourly": "True"}}\n</tool_call>'
)
ARGUMENTS = '{"city": "Rome", "days": 3, "hourly": true}'
TWO = "Let me see.\n\n" + HERMES + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def test_auto_whole_and_streamed(checkpoint: Checkpoint) -> None:
    with saying(checkpoint, TWO, "It is 20 degrees.\n") as running:
        answer = post(running, tools=[WEATHER, NOW], n=2)
        calls, text = answer["choices"]
        assert (calls["finish_reason"], calls["message"]["content"]) == ("tool_calls", "Let me see.")
        assert [call["function"] for call in calls["message"]["tool_calls"]] == [
            {"name": "get_weather", "arguments": ARGUMENTS},
            {"name": "now", "arguments": "{}"},
        ]
        assert (text["finish_reason"], text["message"]) == (
            "stop",
            {"role": "assistant", "content": "It is 20 degrees.\n"},
        )
        choices, chunks = streamed(running, tools=[WEATHER, NOW], n=2, stream_options={"include_usage": True})
        assert choices[0] == {
            "content": "Let me see.",
            "calls": {0: {"name": "get_weather", "arguments": ARGUMENTS}, 1: {"name": "now", "arguments": "{}"}},
            "finish": "tool_calls",
        }
        assert choices[1] == {"content": "It is 20 degrees.\n", "calls": {}, "finish": "stop"}
        assert chunks[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
        first = next(p for c in chunks for n in c["choices"] for p in n["delta"].get("tool_calls", ()))
        assert {"index", "id", "type", "function"} == set(first) and first["function"]["name"] == "get_weather"


def test_arguments_stream(checkpoint: Checkpoint) -> None:
    script = [*load_tokenizer(checkpoint).encode(HERMES.replace("Rome", "abcdefghijklmnopqrstuvwxyz")), EOS]
    fake = FakeEngine(script=scripted(script), stop_sets={"eos": frozenset([EOS])}, delay=0.005)
    with serving(checkpoint, fake) as running:
        _, chunks = streamed(running, tools=[WEATHER])
    pieces = [
        p["function"]["arguments"] for c in chunks for n in c["choices"] for p in n["delta"].get("tool_calls", ())
    ]
    assert len(pieces) > 3  # how many tokens share a chunk is the machine's business


def test_content_is_content_when_nothing_may_be_called(checkpoint: Checkpoint) -> None:
    with saying(checkpoint, TWO) as running:
        for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            (choice,) = post(running, **body)["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (TWO, "stop")
            assert "tool_calls" not in choice["message"]
        assert "get_weather" in prompt_of(
            running, checkpoint
        )  # tool_choice none: the model knows the tools all the same


def prompt_of(running: Running, checkpoint: Checkpoint) -> str:
    return load_tokenizer(checkpoint).decode(unpack_ids(running.engine.submitted[-1].prompt_ids))


BROKEN = [
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", }}\n</tool_call>',
    '<tool_call>\n{"name": "rm_rf", "arguments": {}}\n</tool_call>',
    "<tool_call>\nget_weather(city='Rome')\n</tool_call>",
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ro',
    "<tool_call>",
    '{"name": "get_weather"}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_malformed_calls_are_text(checkpoint: Checkpoint, text: str) -> None:
    with saying(checkpoint, text) as running:
        (choice,) = post(running, tools=[WEATHER])["choices"]
        assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": text}, "stop")
        choices, _ = streamed(running, tools=[WEATHER])
        assert (choices[0]["content"], choices[0]["finish"]) == (text, "stop")


SPOKEN = {
    "qwen3_coder": CODER,
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}[TOOL_CALLS]now[ARGS]{}',
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "llama3": '<|python_tag|>{"name": "get_weather", "parameters": {}}; {"name": "now", "parameters": {}}',
    "granite": '<|tool_call|>[{"name": "get_weather", "arguments": {}}, {"name": "now", "arguments": {}}]',
    "hermes": TWO,
}


@pytest.mark.parametrize("form", SPOKEN)
def test_markers_that_are_control_tokens_are_seen_and_not_shown(checkpoint: Checkpoint, form: str) -> None:
    with saying(checkpoint, SPOKEN[form], options=TextOptions(tool_format=form)) as running:
        (choice,) = post(running, tools=[WEATHER, NOW])["choices"]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "now"]
        assert "tool" not in (choice["message"]["content"] or "") and choice["finish_reason"] == "tool_calls"


def test_one_call_where_parallel_ones_are_not_wanted(checkpoint: Checkpoint) -> None:
    with saying(checkpoint, TWO) as running:
        answer = post(running, tools=[WEATHER, NOW], parallel_tool_calls=False)
        (choice,) = answer["choices"]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
        assert choice["finish_reason"] == "tool_calls"
        choices, _ = streamed(running, tools=[WEATHER, NOW], parallel_tool_calls=False)
        assert list(choices[0]["calls"]) == [0] and choices[0]["finish"] == "tool_calls"


def test_a_stop_string_in_a_call_makes_no_whole_call_of_it(checkpoint: Checkpoint) -> None:
    """Clients that see tool_calls parse the arguments."""
    with saying(checkpoint, TWO) as running:
        (choice,) = post(running, tools=[WEATHER, NOW], stop=["days"])["choices"]
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"city": "Rome", ']
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "days")
        (choice,) = post(running, tools=[WEATHER, NOW], stop=["\n</tool"])["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Let me see.")


class Together(FakeEngine):
    """Says all tokens of a sample in one delta, as a busy front end finds them."""

    def submit(self, submit: Submit) -> Any:
        return self._joined(super().submit(submit))

    async def _joined(self, stream: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        deltas = [delta async for delta in stream]
        ids = [token_id for delta in deltas for token_id in delta.token_ids]
        logprobs = [entry for delta in deltas for entry in delta.logprobs]
        yield msgspec.structs.replace(deltas[-1], token_ids=ids, logprobs=logprobs)


@pytest.mark.parametrize("kind", [FakeEngine, Together])
def test_what_follows_the_only_call_is_not_counted(checkpoint: Checkpoint, kind: type[FakeEngine]) -> None:
    ids = load_tokenizer(checkpoint).encode(HERMES + "\nand more" * 9)
    with serving(checkpoint, kind(script=scripted(ids), stop_sets={"eos": frozenset([EOS])})) as running:
        answer = post(running, tools=[WEATHER], parallel_tool_calls=False, max_tokens=len(ids), logprobs=True)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == ARGUMENTS
    num_counted = len(load_tokenizer(checkpoint).encode(HERMES[: HERMES.index("}}") + 2]))
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["content"]) == num_counted


def test_a_whole_round_with_a_real_client(checkpoint: Checkpoint) -> None:
    """The call, its result, and the model's next prompt, which has both."""
    with saying(checkpoint, HERMES) as running, client_of_url(running) as client:
        first = client.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER])
        message = first.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "20 <|im_end|>"}
        client.chat.completions.create(model="tiny", messages=[*ASK, message, result], tools=[WEATHER])
        prompt = prompt_of(running, checkpoint)
        assert f'"arguments": {ARGUMENTS}' in prompt and "tool\n20 <|im_end|>" in prompt


@contextmanager
def client_of_url(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="x", max_retries=0) as client:
        yield client


def test_a_format_of_the_text_beside_tools(forced: openai.OpenAI) -> None:
    """auto: a call or JSON as asked, never anything else."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["left", "right"]}}}
    answer = forced.chat.completions.create(
        **settings(tools=[WEATHER], response_format=form, n=4, parallel_tool_calls=False)
    )
    for choice in answer.choices:
        if choice.message.tool_calls:
            check_weather(choice.message.tool_calls[0].function.arguments)
            assert choice.message.content is None
        else:
            assert json.loads(choice.message.content) in ("left", "right")


# ---- beside reasoning


THOUGHT = "<think>\nI could <tool_call>\n{}\n</tool_call>.\n</think>\n\n" + HERMES


@pytest.mark.parametrize("separate", [True, False])
def test_calls_in_thoughts_are_thoughts(checkpoint: Checkpoint, separate: bool) -> None:
    options = TextOptions(reasoning="think")
    with saying(checkpoint, THOUGHT, options=options) as running:
        (choice,) = post(running, tools=[WEATHER], separate_reasoning=separate)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
        thought = "I could <tool_call>\n{}\n</tool_call>."
        if separate:
            assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == (thought, None)
        else:
            assert choice["message"]["content"] == f"<think>\n{thought}\n</think>"
        choices, _ = streamed(running, tools=[WEATHER], separate_reasoning=separate)
        assert choices[0]["content"] == (choice["message"]["content"] or "") and len(choices[0]["calls"]) == 1


# ---- bodies


def use_of(**fields: Any) -> ToolUse | None:
    body = {"messages": ASK} | fields
    return chat_call(decode_body(json.dumps(body).encode(), ChatBody), Caller()).tools


def conversation_of(**fields: Any) -> Conversation:
    body = {"messages": ASK} | fields
    (prompt,) = chat_call(decode_body(json.dumps(body).encode(), ChatBody), Caller()).prompts
    assert isinstance(prompt, Conversation)
    return prompt


F_WEATHER, F_NOW = Function("get_weather", SCHEMA), Function("now", {"type": "object", "properties": {}})
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}


@pytest.mark.parametrize(
    ("fields", "use"),
    [
        ({}, None),
        ({"tools": []}, None),
        ({"tools": None, "tool_choice": "auto"}, None),
        ({"tools": [WEATHER], "tool_choice": "none"}, None),
        ({"tools": [WEATHER, NOW]}, ToolUse((F_WEATHER, F_NOW))),
        ({"tools": [WEATHER, NOW], "tool_choice": "auto"}, ToolUse((F_WEATHER, F_NOW))),
        ({"tools": [WEATHER], "parallel_tool_calls": False}, ToolUse((F_WEATHER,), is_parallel=False)),
        ({"tools": [WEATHER], "tool_choice": "required"}, ToolUse((F_WEATHER,), True)),
        ({"tools": [WEATHER], "tool_choice": "any"}, ToolUse((F_WEATHER,), True)),
        ({"tools": [WEATHER, NOW], "tool_choice": NAMED}, ToolUse((F_WEATHER,), True, False)),
        ({"tools": [NOW, WEATHER], "tool_choice": {"type": "function", "name": "now"}}, ToolUse((F_NOW,), True, False)),
        ({"tools": [NOW, WEATHER], "tool_choice": ALLOWED}, ToolUse((F_NOW,), True)),
        (
            {"tools": [{"function": {"name": "now", "strict": True}}]},
            ToolUse((Function("now", {"type": "object", "properties": {}}, True),)),
        ),
    ],
)
def test_what_a_body_asks(fields: dict[str, Any], use: ToolUse | None) -> None:
    assert use_of(**fields) == use


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": "x"}, "tools", "expected"),
        ({"tools": [3]}, "tools", "expected"),
        ({"tools": [{}]}, "tools", r"tools\[0\]: give the function"),
        ({"tools": [named(None)]}, "tools", "1 to 64"),
        ({"tools": [named("a b")]}, "tools", "1 to 64"),
        ({"tools": [named("é")]}, "tools", "1 to 64"),
        ({"tools": [named("x" * 65)]}, "tools", "1 to 64"),
        ({"tools": [named("x\n")]}, "tools", "1 to 64"),
        ({"tools": [NOW, NOW]}, "tools", "two tools are called 'now'"),
        ({"tools": [named(f"f{n}") for n in range(129)]}, "tools", "at most 128"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools", "JSON schema"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools",
            "type object",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": 3}}]}, "tools", "description"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools", "strict"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "only type function"),
        ({"tools": [NOW], "tool_choice": "always"}, "tool_choice", "must be none, auto, required"),
        ({"tools": [NOW], "tool_choice": 5}, "tool_choice", "must be none, auto, required"),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice", "'get_weather', which is not among the tools: now"),
        ({"tool_choice": NAMED}, "tool_choice", "not among the tools: none"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [NOW], "tool_choice": "required", "guided_json": {}}, "tool_choice", "the answer must be a call"),
        ({"tools": [NOW], "guided_regex": "a"}, "tool_choice", "only a JSON schema"),
        ({"tools": [NOW], "parallel_tool_calls": "no"}, "parallel_tool_calls", "expected"),
        ({"functions": [{"name": "f"}]}, "functions", "use `tools`"),
        ({"function_call": {"name": "f"}}, "function_call", "use `tools`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises((InputError, NotSupportedError), match=message) as caught:
        use_of(**fields)
    assert caught.value.param == param and caught.value.status == 400


def test_templates_get_tools_as_clients_write_them() -> None:
    given = {"type": "function", "extra": 1, "function": {"name": "f", "strict": True, "x": [1], "description": None}}
    empty = {"type": "object", "properties": {}}
    told = {"type": "function", "extra": 1, "function": {"name": "f", "x": [1], "parameters": empty}}
    for choice in ("auto", "none", "required"):
        assert conversation_of(tools=[given], tool_choice=choice).tools == [told]
    assert conversation_of().tools is None is conversation_of(tools=[]).tools


def test_a_model_that_calls_nothing_says_so(checkpoint: Checkpoint) -> None:
    with saying(checkpoint, "x", options=TextOptions(tool_format="off")) as running:
        answer = httpx.post(running.url + "/v1/chat/completions", json={"messages": ASK, "tools": [NOW]})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
        assert "--tool-format" in answer.json()["error"]["message"]
        post(running, tools=[NOW], tool_choice="none")


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    folder = tool_model(tmp_path / "tiny")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": settings["chat_template"]}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    text = load_text(open_checkpoint(str(folder)))
    assert isinstance(text.tools, Hermes) and text.template is not None
    assert text.template.render(conversation_of()) == "x"
    assert "get_weather" in text.template.render(conversation_of(tools=[WEATHER]))


def test_other_paths_are_told_of_tools(checkpoint: Checkpoint) -> None:
    with saying(checkpoint, "x") as running:
        body = {"messages": ASK, "tools": [WEATHER]}
        prompt = httpx.post(running.url + "/apply-template", json=body).json()["prompt"]
        assert "get_weather" in prompt
        count = httpx.post(running.url + "/tokenize", json=body).json()["count"]
        assert count == post(running, **body)["usage"]["prompt_tokens"]
        assert httpx.post(running.url + "/tokenize", json={"messages": ASK, "tools": [{}]}).status_code == 400


@pytest.mark.parametrize(
    ("strict", "schema", "status"),
    [
        (True, {"type": "object", "not": {}}, 400),
        (False, {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "not": {}}, 200),
        (None, {"anyOf": [{"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}]}, 200),
        (None, functools.reduce(lambda inner, _: {"items": inner}, range(70), {}), 400),
        (None, {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object", "maxProperties": 0}}}, 200),
    ],
)
def test_schemas_that_cannot_be_followed(
    checkpoint: Checkpoint, engine: InprocClient, strict: bool | None, schema: Any, status: int
) -> None:
    """Strict functions are refused; of others only what can be is followed."""
    function = {"name": "f", "strict": strict, "parameters": schema}
    tools: Sequence[Any] = [{"type": "function", "function": function}]
    with serving(checkpoint, engine) as running:
        body = {
            "messages": ASK,
            "tools": tools,
            "tool_choice": "required",
            "max_tokens": 60,
            "temperature": 1,
            "seed": 1,
        }
        answer = httpx.post(running.url + "/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert "tools" in answer.json()["error"]["message"] and answer.json()["error"]["param"] == "tools"
