"""The `openai` package, sync, async and streaming, against a real server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.api.conftest import SCRIPT
from tests.api.serving import Running


@pytest.fixture
def api(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as api:
        yield api
    server.assert_idle()


MESSAGES = [{"role": "user", "content": "Write code."}]


def test_completion(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="tiny", prompt="def f(x):\n    ", max_tokens=100, temperature=0, seed=1)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (SCRIPT, "stop")
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_stream(api: openai.OpenAI) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(api.completions.create(model="tiny", prompt="x" * 40, max_tokens=100, n=2, **options))
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in choices) == SCRIPT
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == 40
    again = list(api.completions.create(model="tiny", prompt="x" * 40, max_tokens=100, **options))
    assert again[-1].usage.prompt_tokens_details.cached_tokens == 32


def test_stop_strings_across_tokens(api: openai.OpenAI) -> None:
    for stream in (False, True):
        stops = [f"never {number}" for number in range(63)] + ["1\npri"]
        answer = api.completions.create(model="tiny", prompt="x", max_tokens=100, stop=stops, stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "return x + "
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_length_and_echo(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="tiny", prompt=["a ", "b "], max_tokens=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["a return", "b return"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.completion_tokens == 2


def test_default_length_is_sixteen_for_completions(api: openai.OpenAI, server: Running) -> None:
    api.completions.create(model="tiny", prompt="x")
    assert server.engine.submitted[-1].limits.max_tokens == 16
    api.chat.completions.create(model="tiny", messages=MESSAGES)
    assert server.engine.submitted[-1].limits.max_tokens > 4000


def test_chat(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=50)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SCRIPT, "stop")
    assert answer.object == "chat.completion"


def test_chat_stream(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == SCRIPT


def test_errors_become_the_packages_exceptions(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model="tiny", prompt="x", extra_body={"use_beam_search": True})
    assert caught.value.param == "use_beam_search" and caught.value.code == "not_supported"
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model="tiny", prompt="x", logit_bias={"999999": 2})
    assert caught.value.param == "logit_bias" and caught.value.code == "invalid_request"
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model="tiny", prompt="x", max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model="tiny", input="x")


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["tiny"]


async def test_async_streams_side_by_side(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="EMPTY", max_retries=0) as api:

        async def one(number: int) -> str:
            stream = await api.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": str(number)}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert set(await asyncio.gather(*map(one, range(20)))) == {SCRIPT}
        whole = await api.completions.create(model="tiny", prompt="x", max_tokens=100)
        assert whole.choices[0].text == SCRIPT
    server.assert_idle()


async def test_a_stream_left_early(endless: Running) -> None:
    async with openai.AsyncOpenAI(base_url=endless.url + "/v1", api_key="EMPTY", max_retries=0) as api:
        stream = await api.completions.create(model="tiny", prompt="x", max_tokens=4000, stream=True)
        async for _ in stream:
            break
        await stream.close()
    endless.assert_idle()
    assert sum(endless.engine.num_aborted.values()) >= 1
