"""How sure a model was: said of each choice on every path that fills holes, and what a threshold does with it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import httpx
import pytest

from tests.api.test_fim_completions import Editor, editor_of
from tests.text.fim_vocabularies import any_family


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    yield from editor_of(any_family(tmp_path_factory.mktemp("qwen"), "qwen"))


HOLE: dict[str, Any] = {"prompt": "def f(x):\n    retu", "suffix": "\n", "max_tokens": 20}


def said(choice: dict[str, Any]) -> dict[str, float]:
    (confidence,) = choice["tabstop"].values()
    return confidence


def test_it_is_the_mean_and_the_least_of_the_tokens(qwen: Editor) -> None:
    """Those that `logprobs` shows, on the same request; nothing where nobody asks."""
    qwen.say("rn x", "return", end="<|fim_pad|>")
    answer = qwen.post(**HOLE, n=2, confidence=True, logprobs=1)
    for choice in answer["choices"]:
        shown = choice["logprobs"]["token_logprobs"]
        assert len(shown) >= 2 and said(choice) == {
            "mean": pytest.approx(fmean(shown), abs=1e-4),
            "min": pytest.approx(min(shown), abs=1e-4),
        }
    alone = qwen.post(**HOLE, n=2, confidence=True)
    assert list(map(said, alone["choices"])) == list(map(said, answer["choices"]))
    assert [choice["logprobs"] for choice in alone["choices"]] == [None, None]
    assert "tabstop" not in qwen.post(**HOLE)["choices"][0]
    assert said(alone["choices"][0]) != said(alone["choices"][1])


def test_every_path_says_the_same_streaming_or_not(qwen: Editor) -> None:
    qwen.say("rn x", end="<|fim_pad|>")
    expected = said(qwen.post(**HOLE, confidence=True)["choices"][0])
    fim = qwen.post("/v1/fim/completions", **HOLE, confidence=True)
    infill = {"input_prefix": HOLE["prompt"], "input_suffix": "\n", "n_predict": 20, "confidence": True}
    llama = qwen.post("/infill", **infill)
    assert said(fim["choices"][0]) == llama["tabstop"]["confidence"] == expected
    assert llama["tabstop"]["fim"] == fim["tabstop"]["fim"] == "qwen" and "completion_probabilities" not in llama
    for path in ("/v1/completions", "/v1/fim/completions"):
        events = qwen.events(path, **HOLE, confidence=True)
        ended = [event["choices"][0] for event in events if "tabstop" in event["choices"][0]]
        assert [said(choice) for choice in ended] == [expected] and ended[0]["finish_reason"] == "stop"
        assert not any(event["choices"][0].get("logprobs") for event in events)
    events = qwen.events("/infill", **infill)
    assert [event["tabstop"]["confidence"] for event in events if "tabstop" in event] == [expected]
    raw = qwen.post("/completion", prompt="a", n_predict=20, confidence=True)
    assert raw["tabstop"].keys() == {"confidence"}


def test_healed_tokens_are_no_part_of_it(qwen: Editor) -> None:
    """What only repeats the client's own bytes was not the model's choice."""
    qwen.say("return x", end="<|fim_pad|>")
    answer = qwen.post(**HOLE, token_healing=True, confidence=True, logprobs=0)
    shown = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert answer["tabstop"]["healed_tokens"] and said(answer["choices"][0])["mean"] == pytest.approx(
        fmean(shown), abs=1e-4
    )


def test_a_guess_has_no_text(qwen: Editor) -> None:
    qwen.say("rn x", "return", end="<|fim_pad|>")
    both = qwen.post(**HOLE, n=2, confidence=True)["choices"]
    low, high = sorted(both, key=lambda choice: said(choice)["mean"])
    between = (said(low)["mean"] + said(high)["mean"]) / 2
    answer = qwen.post(**HOLE, n=2, min_confidence=between, logprobs=0, stop=["never"])
    choices = answer["choices"]
    assert [choice["text"] for choice in choices] == [
        "" if choice["index"] == low["index"] else high["text"] for choice in both
    ]
    hidden = choices[low["index"]]
    assert hidden["finish_reason"] == "stop" and not (hidden["logprobs"] or {}).get("tokens")
    assert said(hidden) == said(low) and "stop_reason" not in hidden
    fim = qwen.post("/v1/fim/completions", **HOLE, min_confidence=0)["choices"][0]
    assert fim["message"]["content"] == "" and fim["finish_reason"] == "stop"
    infill = {"input_prefix": HOLE["prompt"], "input_suffix": "\n", "n_predict": 20, "min_confidence": 0}
    assert qwen.post("/infill", **infill, return_tokens=True)["content"] == ""
    assert qwen.post("/infill", **infill, return_tokens=True)["tokens"] == []
    assert [o["content"] for o in qwen.post("/infill", **infill, n_cmpl=3)] == [""], "equal ones are one"
    assert qwen.post("/infill", **infill | {"min_confidence": -1000})["content"] != ""


def test_the_best_of_several_say_it_too(qwen: Editor) -> None:
    qwen.say("rn x", "return", end="<|fim_pad|>")
    answer = qwen.post(**HOLE, n=1, best_of=2, confidence=True)
    both = qwen.post(**HOLE, n=2, confidence=True)["choices"]
    assert said(answer["choices"][0])["mean"] == max(said(choice)["mean"] for choice in both)
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/fim/completions", "/infill"])
@pytest.mark.parametrize(("name", "value"), [("min_confidence", -1.0), ("distinct", True)])
def test_what_needs_the_whole_text_is_refused_in_streams(qwen: Editor, path: str, name: str, value: Any) -> None:
    response = httpx.post(qwen.running.url + path, json=HOLE | {"stream": True, name: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == name
    assert "leave stream out" in response.json()["error"]["message"]
    qwen.say("a", " a", "b")
    answer = qwen.post("/v1/fim/completions", **HOLE, n=3, distinct=True)
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "b"]


@pytest.mark.parametrize("value", [0.5, -1001, "high", True])
def test_thresholds_are_log_probabilities(qwen: Editor, value: Any) -> None:
    response = httpx.post(qwen.running.url + "/v1/completions", json=HOLE | {"min_confidence": value})
    assert response.status_code == 400 and response.json()["error"]["param"] == "min_confidence"


def test_no_token_has_no_confidence(qwen: Editor) -> None:
    qwen.say("x")
    assert said(qwen.post(**HOLE | {"max_tokens": 0}, confidence=True)["choices"][0]) is None
