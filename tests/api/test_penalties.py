"""What each dialect's penalties look at, and 64 stop strings: over HTTP on a tiny real model, at temperature 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.inproc import InprocClient
from tests.api.serving import serving
from tests.tiny import tiny_llama

SEEN, UNSEEN = 40, 41
PROMPT = [SEEN, *range(100, 120)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tiny_llama(tmp_path_factory.mktemp("tiny"))
    client = InprocClient(
        build_core(EngineConfig(model=str(folder), dtype="float32", num_threads=1, max_model_len=256))
    )
    with serving(open_checkpoint(str(folder)), client) as running:  # type: ignore[arg-type]
        yield running.url
    client.close()


@pytest.fixture(scope="module")
def lead(url: str) -> dict[str, Any]:
    """A body whose first token is SEEN, one nat before UNSEEN. Both logits are far over 0; no other token counts."""
    body = {"prompt": [[*PROMPT, token] for token in (SEEN, UNSEEN)], "prompt_logprobs": 0, "max_tokens": 0}
    choices = httpx.post(url + "/v1/completions", json=body).json()["choices"]
    seen, unseen = (
        choice["prompt_logprobs"][-1][str(token)]["logprob"]
        for choice, token in zip(choices, (SEEN, UNSEEN), strict=True)
    )
    biases = {str(SEEN): 60 - seen + 1, str(UNSEEN): 60 - unseen}
    return {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "logit_bias": biases} | {
        "allowed_token_ids": [SEEN, UNSEEN]
    }


def first_token(url: str, path: str, body: dict[str, Any]) -> int:
    """The token that is drawn first; it is SEEN or UNSEEN."""
    answer = httpx.post(url + path, json=body | {"max_tokens": 1, "return_tokens": True}).json()
    if path == "/completion":
        return int(answer["tokens"][0])
    return {"(": SEEN, ")": UNSEEN}[answer["choices"][0]["text"]]


@pytest.mark.parametrize(
    ("path", "penalty", "expected"),
    [
        ("/v1/completions", {}, SEEN),
        ("/v1/completions", {"presence_penalty": 2}, SEEN),  # OpenAI: of the output alone
        ("/v1/completions", {"frequency_penalty": 2}, SEEN),
        ("/v1/completions", {"repetition_penalty": 3}, UNSEEN),  # vLLM: of the prompt, too
        ("/completion", {}, SEEN),
        ("/completion", {"presence_penalty": 2}, UNSEEN),  # llama.cpp: of the last tokens, be they the prompt's
        ("/completion", {"frequency_penalty": 2}, UNSEEN),
        ("/completion", {"repeat_penalty": 3}, UNSEEN),
        ("/completion", {"repeat_penalty": 3, "repeat_last_n": len(PROMPT)}, UNSEEN),
        ("/completion", {"repeat_penalty": 3, "repeat_last_n": len(PROMPT) - 1}, SEEN),
        ("/completion", {"repeat_penalty": 3, "repeat_last_n": -1}, UNSEEN),
        ("/completion", {"repeat_penalty": 3, "presence_penalty": 2, "repeat_last_n": 0}, SEEN),
    ],
)
def test_each_dialect_looks_at_its_own_tokens(
    url: str, lead: dict[str, Any], path: str, penalty: dict[str, Any], expected: int
) -> None:
    assert first_token(url, path, lead | penalty) == expected


@pytest.mark.parametrize(("before", "expected"), [(63, UNSEEN), (64, SEEN)])
def test_llama_looks_at_64_tokens_unless_told(url: str, lead: dict[str, Any], before: int, expected: int) -> None:
    """The prompt ends with `before` tokens after the one that was seen."""
    biases = {str(SEEN): 100, str(UNSEEN): 50}
    body = lead | {"prompt": [SEEN] + [7] * before, "logit_bias": biases, "repeat_penalty": 100}
    assert first_token(url, "/completion", body) == expected


def test_what_was_drawn_counts_in_every_dialect(url: str, lead: dict[str, Any]) -> None:
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        answer = httpx.post(url + "/v1/completions", json=lead | penalty | {"max_tokens": 12}).json()
        assert len(set(answer["choices"][0]["text"])) == 2
    answer = httpx.post(url + "/v1/completions", json=lead | {"logit_bias": {str(SEEN): 100}, "max_tokens": 12}).json()
    assert len(set(answer["choices"][0]["text"])) == 1


def test_sixty_four_stop_strings_each_of_which_ends_the_text(url: str) -> None:
    body = {"prompt": "def f(x):", "temperature": 0, "ignore_eos": True, "max_tokens": 60}
    text = httpx.post(url + "/v1/completions", json=body).json()["choices"][0]["text"]
    others = [f"never {n}" for n in range(63)]
    for place in (0, 40, 63):
        word = text[5:8]
        stops = [*others[:place], word, *others[place:]]
        (cut,) = httpx.post(url + "/v1/completions", json=body | {"stop": stops}).json()["choices"]
        assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (text[: text.index(word)], "stop", word)
    kept = httpx.post(url + "/v1/completions", json=body | {"stop": stops, "include_stop_str_in_output": True}).json()
    assert kept["choices"][0]["text"] == text[: text.index(word)] + word
    refused = httpx.post(url + "/v1/completions", json=body | {"stop": [*stops, "65th"]})
    assert refused.status_code == 400 and "at most 64 stop strings" in refused.json()["error"]["message"]
