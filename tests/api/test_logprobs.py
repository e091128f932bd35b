"""Log-probabilities over HTTP: a tiny real model, the `openai` package, and transformers as the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tabstop.api.logprobs import chat_logprobs, completion_logprobs
from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.inproc import InprocClient
from tabstop.text.reporting import Likelihood, ReportedToken
from tabstop.text.tokenizer import load_tokenizer
from tests.api.serving import serving
from tests.models.oracle import oracle_logits
from tests.tiny import tiny_llama

PROMPT = "def f(x):\n"
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
SETTINGS: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    client = InprocClient(
        build_core(EngineConfig(model=str(folder), dtype="float32", num_threads=1, max_model_len=256))
    )
    with serving(open_checkpoint(str(folder)), client) as running:  # type: ignore[arg-type]
        yield running.url
    client.close()


@pytest.fixture
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", max_retries=0) as api:
        yield api


def exact(folder: Path, prompt_ids: list[int], ids: list[int]) -> torch.Tensor:
    """float64 [len(ids), vocab]: what transformers makes of each place of the continuation."""
    (logits,) = oracle_logits(folder, [[*prompt_ids, *ids]])
    return logits[len(prompt_ids) - 1 : -1].double().log_softmax(-1)


def token_ids(url: str, body: dict[str, Any]) -> list[int]:
    """What the same request draws, as llama.cpp's dialect says it."""
    answer = httpx.post(url + "/completion", json=body | {"return_tokens": True}).json()
    return list(answer["tokens"])


def test_completions_report_what_the_model_computes(api: openai.OpenAI, url: str, folder: Path) -> None:
    extra = {"repetition_penalty": 1.3, "ignore_eos": True}
    answer = api.completions.create(prompt=PROMPT, logprobs=3, logit_bias={"40": 3}, extra_body=extra, **SETTINGS)
    (choice,) = answer.choices
    found = choice.logprobs
    body = {"prompt": PROMPT, "logit_bias": [[40, 3]], "repeat_last_n": -1, "repeat_penalty": 1.3, "ignore_eos": True}
    ids = token_ids(url, body | SETTINGS)
    tokenizer = load_tokenizer(open_checkpoint(str(folder)))
    table = exact(folder, tokenizer.encode(PROMPT), ids)
    assert len(ids) == 12 == len(found.token_logprobs) == len(found.tokens) == len(found.text_offset)
    assert found.token_logprobs == pytest.approx([table[at, i].item() for at, i in enumerate(ids)], abs=1e-4)
    for at, shown in enumerate(found.top_logprobs):
        top = table[at].topk(3).values.tolist()
        likeliest = sorted(shown.values(), reverse=True)
        assert likeliest[:3] == pytest.approx(top[: len(likeliest)], abs=1e-4) and 3 <= len(shown) <= 4
        assert shown[found.tokens[at]] == found.token_logprobs[at]
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)


def test_streamed_equals_whole(api: openai.OpenAI) -> None:
    for logprobs in (0, 2):
        settings = SETTINGS | {"prompt": PROMPT, "logprobs": logprobs, "n": 2}
        whole = api.completions.create(**settings)
        chunks = [choice for chunk in api.completions.create(stream=True, **settings) for choice in chunk.choices]
        for choice in whole.choices:
            parts = [c.logprobs for c in chunks if c.index == choice.index and c.logprobs]
            for name in ("tokens", "token_logprobs", "text_offset"):
                joined = [entry for part in parts for entry in getattr(part, name)]
                expected = getattr(choice.logprobs, name)  # a cached prompt rounds otherwise
                assert joined == (expected if name == "tokens" else pytest.approx(expected, abs=1e-5))
            shown = [set(entry) for part in parts for entry in part.top_logprobs]
            assert shown == [set(entry) for entry in choice.logprobs.top_logprobs]
            assert all(len(shown) >= max(1, logprobs) for shown in choice.logprobs.top_logprobs)


def test_best_of_ranks_by_the_mean_and_counts_all(api: openai.OpenAI) -> None:
    settings = SETTINGS | {"prompt": [PROMPT, "x = "], "extra_body": {"ignore_eos": True}}
    every = api.completions.create(n=4, logprobs=0, **settings).choices
    best = api.completions.create(n=1, best_of=4, **settings)
    means = [sum(choice.logprobs.token_logprobs) / 12 for choice in every]
    expected = [max(range(first, first + 4), key=means.__getitem__) for first in (0, 4)]
    assert [choice.text for choice in best.choices] == [every[index].text for index in expected]
    assert [choice.index for choice in best.choices] == [0, 1] and best.choices[0].logprobs is None
    assert best.usage.completion_tokens == 2 * 4 * 12


def test_chats_report_too(api: openai.OpenAI) -> None:
    settings = SETTINGS | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    (choice,) = api.chat.completions.create(**settings).choices
    content = choice.logprobs.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert b"".join(bytes(entry.bytes) for entry in content).startswith(choice.message.content.encode()[:1])
    chunks = [part for chunk in api.chat.completions.create(stream=True, **settings) for part in chunk.choices]
    streamed = [entry for part in chunks if part.logprobs for entry in part.logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    for one, other in zip(streamed, content, strict=True):  # a cached prompt rounds otherwise
        logprobs = [[entry.logprob for entry in (each, *each.top_logprobs)] for each in (one, other)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)
    (silent,) = api.chat.completions.create(**SETTINGS, messages=MESSAGES).choices
    assert silent.logprobs is None and silent.message.content == choice.message.content


def test_llama_shows_probabilities(url: str) -> None:
    body = SETTINGS | {"prompt": PROMPT, "n_probs": 2}
    answer = httpx.post(url + "/completion", json=body).json()
    shown = answer["completion_probabilities"]
    assert len(shown) == answer["tokens_predicted"] and {len(entry["top_logprobs"]) for entry in shown} == {2}
    assert shown[0]["top_logprobs"][0]["logprob"] >= shown[0]["top_logprobs"][1]["logprob"]
    assert "completion_probabilities" not in httpx.post(url + "/completion", json=body | {"n_probs": 0}).json()


def test_fim_shows_them_as_chats_do(url: str) -> None:
    body = {"prompt": "x = ", "suffix": "\n", "max_tokens": 5, "logprobs": True, "top_logprobs": 1, "ignore_eos": True}
    answer = httpx.post(url + "/v1/fim/completions", json=body).json()
    assert len(answer["choices"][0]["logprobs"]["content"]) == 5 == answer["usage"]["completion_tokens"]


def test_json_has_no_infinity_and_tokens_may_be_spelled_alike() -> None:
    never = Likelihood(7, b"\xff", -float("inf"), 50)
    alike = [Likelihood(8, b"\xfe", -0.5, 1), Likelihood(9, b"a", -1.0, 2), Likelihood(10, b"a", -2.0, 3)]
    tokens = [ReportedToken(never, alike, 3)]
    shown = completion_logprobs(tokens)
    assert shown is not None and shown["token_logprobs"] == [-9999.0]
    assert shown["tokens"] == ["bytes:\\xff"]  # a part of a character
    assert shown["top_logprobs"] == [{"bytes:\\xfe": -0.5, "a": -1.0, "bytes:\\xff": -9999.0}]
    content = (chat_logprobs(tokens) or {})["content"][0]
    assert content["bytes"] == [255] and [entry["token"] for entry in content["top_logprobs"]] == ["\ufffd", "a", "a"]
