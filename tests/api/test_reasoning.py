"""Models that think, over HTTP: reasoning and answer apart, streamed and whole, with every way to ask for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.grammar.specs import Thinking, thinking_constraint
from tabstop.text.defaults import stop_sets
from tabstop.text.tokenizer import load_tokenizer
from tabstop.types import unpack_ids
from tests.api.serving import Running, serving
from tests.text.fim_vocabularies import byte_level_definition, write

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif reasoning_effort == 'high' %}<think>\n{% endif %}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
THOUGHTS, ANSWER = "Let me see.\n\nThere is <b>.", "def f(): ☺\n"
WRITTEN = f"<think>\n{THOUGHTS}\n</think>\n\n{ANSWER}"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def thinker(folder: Path, marked: bool) -> Checkpoint:
    definition = byte_level_definition(SPECIAL)
    for token in definition["added_tokens"][-2:]:
        token["special"] = marked
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    return write(folder, "m", definition, {"model_type": "qwen3"}, settings | {"add_bos_token": False})


@pytest.fixture(scope="module", params=[False, True], ids=["tags", "control tokens"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Its model says WRITTEN, whatever it is asked, but after an opened tag leaves that out."""
    checkpoint = thinker(tmp_path_factory.mktemp("m"), request.param)
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(WRITTEN)
    start, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    assert ids[0] == start and ids.count(end) == 1

    def script(submit: Any, sample: int) -> Iterator[int]:
        prompt = unpack_ids(submit.prompt_ids)
        if end in prompt[-4:]:
            return iter(tokenizer.encode(ANSWER))
        return scripted(ids[1:] if start in prompt[-4:] else ids)(submit, sample)

    with serving(checkpoint, FakeEngine(script, stop_sets(checkpoint, tokenizer))) as running:
        yield running


def ask(server: Running, **body: Any) -> dict[str, Any]:
    answer = httpx.post(server.url + "/v1/chat/completions", json={"messages": MESSAGES} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def num_tokens(server: Running, text: str) -> int:
    return len(server.service.models[0].text.tokenizer.encode(text))


@pytest.mark.parametrize("effort", [None, "high"])
def test_reasoning_is_apart(server: Running, effort: str | None) -> None:
    answer = ask(server, reasoning_effort=effort)
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "reasoning_content": THOUGHTS, "content": ANSWER}
    written = f"{'' if effort else '<think>'}\n{THOUGHTS}\n</think>"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_tokens(server, written)}


def test_streams_say_the_same(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as api:
        chunks = list(
            api.chat.completions.create(
                model="m", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
            )
        )
    for index in range(2):
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
        thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
        texts = [delta.content or "" for delta in deltas]
        assert ("".join(thoughts), "".join(texts)) == (THOUGHTS, ANSWER)
        assert sum(map(bool, thoughts)) > 3 and sum(map(bool, texts)) > 3  # token by token
        assert not any(thought and text for thought, text in zip(thoughts, texts, strict=True))
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens_details is not None
    expected = 2 * num_tokens(server, f"<think>\n{THOUGHTS}\n</think>")
    assert usage.completion_tokens_details.reasoning_tokens == expected


def test_every_token_has_its_log_probability(server: Running) -> None:
    ids = num_tokens(server, WRITTEN)
    whole = ask(server, logprobs=True)["choices"][0]
    assert len(whole["logprobs"]["content"]) == ids
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={"messages": MESSAGES, "logprobs": True, "stream": True}
    ) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    told = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert sum(len(logprobs["content"]) for logprobs in told) == ids


def test_other_ways_to_have_it(server: Running) -> None:
    hidden = ask(server, include_reasoning=False)
    assert hidden["choices"][0]["message"] == {"role": "assistant", "content": ANSWER}
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] > 10
    for body in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
        message = ask(server, **body)["choices"][0]["message"]
        assert message == {"role": "assistant", "content": WRITTEN}
    off = ask(server, chat_template_kwargs={"enable_thinking": False})
    assert off["choices"][0]["message"] == {"role": "assistant", "content": ANSWER}
    assert "completion_tokens_details" not in off["usage"]
    assert ask(server, reasoning_effort="none")["choices"][0]["message"]["content"] == ANSWER


def test_answers_that_are_cut_while_thinking(server: Running) -> None:
    choice = ask(server, max_tokens=6)["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "length"
    assert (
        message["content"] == "" and THOUGHTS.startswith(message["reasoning_content"]) and message["reasoning_content"]
    )


def test_completions_show_what_the_model_wrote(server: Running) -> None:
    body = {"prompt": "<|im_start|>assistant\n", "max_tokens": 100}
    text = httpx.post(server.url + "/v1/completions", json=body).json()["choices"][0]["text"]
    assert THOUGHTS in text and ANSWER in text


def test_constraints_begin_behind_the_reasoning(server: Running) -> None:
    def specs(**body: Any) -> list[Any]:
        ask(server, guided_regex="x+", **body)
        return list(server.engine.submitted[-1].constraints)

    tokenizer = server.service.models[0].text.tokenizer
    control = tokenizer.control_tokens
    tags = Thinking("<think>", "</think>", False, control.get("<think>"), control.get("</think>"))
    first, second = specs()
    assert first == thinking_constraint(tags) and second.kind == "regex"
    assert '"is_open":true' in specs(reasoning_effort="high")[0].value
    assert [spec.kind for spec in specs(reasoning_effort="none")] == ["regex"]
    ask(server)
    assert server.engine.submitted[-1].constraints == ()


def test_tokenize_and_apply_template_take_the_switches(server: Running) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
    prompt = httpx.post(server.url + "/apply-template", json=body).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tokens = httpx.post(server.url + "/tokenize", json=body).json()["tokens"]
    assert tokens == server.service.models[0].text.tokenizer.encode(prompt)
    ask(server, **body)
    assert unpack_ids(server.engine.submitted[-1].prompt_ids) == tokens
    for path in ("/apply-template", "/tokenize", "/v1/chat/completions"):
        refused = httpx.post(server.url + path, json=body | {"chat_template_kwargs": {"messages": []}})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template_kwargs"
