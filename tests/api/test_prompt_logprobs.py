"""Log-probabilities of prompts over HTTP: OpenAI's echo and vLLM's prompt_logprobs, with transformers as the oracle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.inproc import InprocClient
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests.api.serving import serving
from tests.models.oracle import oracle_logits
from tests.tiny import IM_START, tiny_llama

PROMPTS = ["def f(x):\n    return x", "héllo <|im_start|>wörld → 10", "x"]
BASE: dict[str, Any] = {"model": "tiny", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(open_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_model_len": 256}
    client = InprocClient(build_core(EngineConfig(model=str(folder), max_num_batched_tokens=16, **options)))
    with serving(open_checkpoint(str(folder)), client) as running:  # type: ignore[arg-type]
        yield running.url
    client.close()


def post(url: str, path: str = "/v1/completions", **body: Any) -> Any:
    answer = httpx.post(url + path, json=BASE | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected_rows(folder: Path, ids: list[int]) -> torch.Tensor:
    """float64 [n - 1, vocab]: of each token but the first."""
    (logits,) = oracle_logits(folder, [ids])
    return logits[:-1].double().log_softmax(-1)


def assert_echoes(choice: dict[str, Any], prompt: str, ids: list[int], folder: Path) -> None:
    """A choice begins with the prompt, and everything of it is right."""
    shown, text = choice["logprobs"], choice["text"]
    assert text.startswith(prompt)
    assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None and shown["text_offset"][0] == 0
    assert len({len(shown[key]) for key in shown}) == 1
    rows = expected_rows(folder, ids)
    found = shown["token_logprobs"][1 : len(ids)]
    assert found == pytest.approx([float(row[token]) for row, token in zip(rows, ids[1:], strict=True)], abs=1e-4)
    for row, top, name in zip(rows, shown["top_logprobs"][1:], shown["tokens"][1:], strict=False):
        assert 2 <= len(top) <= 3 and name in top
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
    places = list(zip(shown["tokens"], shown["text_offset"], strict=True))[: len(ids)]
    unseen = () if "<|im_start|>" in text else ("<|im_start|>",)  # texts of ids leave control tokens out
    texts = [(token, offset) for token, offset in places if not token.startswith("bytes:") and token not in unseen]
    assert all(text.startswith(token, offset) for token, offset in texts)


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_an_echo_has_its_prompts_log_probabilities(
    url: str, folder: Path, tokenizer: Tokenizer, prompt: str, max_tokens: int
) -> None:
    answer = post(url, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens)
    (choice,) = answer["choices"]
    ids = tokenizer.encode(prompt)
    assert_echoes(choice, prompt, ids, folder)
    assert len(choice["logprobs"]["tokens"]) == len(ids) + max_tokens
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), max_tokens)
    assert choice["finish_reason"] == "length" and usage["prompt_tokens_details"]["cached_tokens"] == 0
    silent = post(url, prompt=prompt, echo=True, max_tokens=max_tokens)["choices"][0]
    assert silent == choice | {"logprobs": None}


def test_many_prompts_texts_and_ids_whole_and_streamed(url: str, folder: Path, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    body = BASE | {"echo": True, "logprobs": 2, "max_tokens": 3, "n": 2, "temperature": 1, "seed": 4}
    whole = post(url, **body | {"prompt": PROMPTS})["choices"]
    assert [choice["index"] for choice in whole] == list(range(6))
    for index, choice in enumerate(whole):
        assert_echoes(choice, PROMPTS[index // 2], ids[index // 2], folder)
    by_ids = post(url, **body | {"prompt": ids})["choices"]
    for index, choice in enumerate(by_ids):
        assert_echoes(choice, tokenizer.decode(ids[index // 2]), ids[index // 2], folder)
        same = whole[index]["logprobs"]["token_logprobs"][1:]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(same, abs=1e-4)
    with openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", max_retries=0) as api:
        extra = {"ignore_eos": True}
        named = {key: value for key, value in body.items() if key not in extra}
        chunks = list(api.completions.create(**named, prompt=PROMPTS, stream=True, extra_body=extra))
    merged = [{"text": "", "token_logprobs": [], "tokens": [], "text_offset": []} for _ in whole]
    for part in (choice for chunk in chunks for choice in chunk.choices):
        target = merged[part.index]
        target["text"] += part.text
        for key in ("token_logprobs", "tokens", "text_offset") if part.logprobs else ():
            target[key] += getattr(part.logprobs, key)
    for one, other in zip(merged, whole, strict=True):
        assert (one["text"], one["tokens"]) == (other["text"], other["logprobs"]["tokens"])
        assert one["text_offset"] == other["logprobs"]["text_offset"]
        logprobs = one["token_logprobs"], other["logprobs"]["token_logprobs"]
        assert logprobs[0][0] is None and logprobs[0][1:] == pytest.approx(logprobs[1][1:], abs=1e-4)


def test_best_of_counts_the_answers_tokens_only(url: str) -> None:
    body = {"prompt": PROMPTS[0], "logprobs": 0, "max_tokens": 4, "temperature": 1, "seed": 4}
    every = post(url, **body, n=5)["choices"]
    best = post(url, **body, n=1, best_of=5, echo=True)["choices"][0]
    ranked = max(every, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]))
    assert best["text"] == PROMPTS[0] + ranked["text"]


def test_vllms_form(url: str, folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    answer = post(url, prompt=[PROMPTS[0], PROMPTS[2]], prompt_logprobs=2, max_tokens=1, logprobs=1, echo=True)
    first, second = answer["choices"]
    assert second["prompt_logprobs"] == [None]
    listed = first["prompt_logprobs"]
    assert listed[0] is None and len(listed) == len(ids)
    for entries, token_id, row in zip(listed[1:], ids[1:], expected_rows(folder, ids), strict=True):
        assert 2 <= len(entries) <= 3
        for key, entry in entries.items():
            assert set(entry) == {"logprob", "rank", "decoded_token"}
            assert entry["logprob"] == pytest.approx(float(row[int(key)]), abs=1e-4)
        assert [entry["rank"] for entry in entries.values()][:2] == [1, 2]
        own = entries[str(token_id)]
        assert own["rank"] == 1 + int((row > row[token_id]).sum())
        assert own["decoded_token"].encode() == tokenizer.spelled(token_id)
    shown = first["logprobs"]["top_logprobs"][1:]
    assert all(len(top) <= 2 for top in shown), "each form shows as many as were asked of it"
    assert "prompt_logprobs" not in post(url, prompt="x", max_tokens=1)["choices"][0]


def test_vllms_form_of_chats(url: str, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = post(url, "/v1/chat/completions", messages=messages, prompt_logprobs=0, max_tokens=0)
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0] == IM_START
    assert [list(entries) for entries in answer["prompt_logprobs"][1:]] == [[str(token)] for token in ids[1:]]
    assert answer["choices"][0]["message"]["content"] == "" and answer["choices"][0]["finish_reason"] == "length"
    assert "prompt_logprobs" not in answer["choices"][0]


def test_a_cut_prompt_reports_what_is_left(url: str, tokenizer: Tokenizer) -> None:
    body = {"prompt": PROMPTS[0], "truncate_prompt_tokens": 4, "max_tokens": 0}
    (choice,) = post(url, **body, echo=True, logprobs=1)["choices"]
    cut = tokenizer.encode(PROMPTS[0])[-4:]
    assert choice["text"] == tokenizer.decode(cut) and len(choice["logprobs"]["tokens"]) == 4


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt_logprobs": 21}, "<= 20"),
        ("/v1/completions", {"prompt_logprobs": -1}, ">= 0"),
        ("/v1/completions", {"echo": True, "logprobs": 21}, "<= 20"),
        ("/v1/completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs needs the whole answer"),
        ("/v1/completions", {"echo": True, "logprobs": 1, "suffix": "y"}, "a hole is laid out in others"),
        ("/v1/fim/completions", {"prompt_logprobs": 1}, "only /v1/completions and /v1/chat/completions"),
        ("/completion", {"prompt_logprobs": 1}, "only /v1/completions and /v1/chat/completions"),
    ],
)
def test_what_cannot_be_is_said(url: str, path: str, body: dict[str, Any], message: str) -> None:
    answer = httpx.post(url + path, json={"prompt": "x"} | body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"], answer.text


def test_a_stream_begins_with_the_whole_prompt(url: str) -> None:
    """It has more tokens than a step, and none is shown before all are there."""
    body = BASE | {"prompt": "x = 1\n" * 20, "echo": True, "logprobs": 0, "max_tokens": 2, "stream": True}
    lines = httpx.post(url + "/v1/completions", json=body).text.split("\n\n")
    first = json.loads(lines[0].removeprefix("data: "))["choices"][0]
    assert first["text"].startswith(body["prompt"]) and first["logprobs"]["text_offset"][-1] >= len(body["prompt"])
