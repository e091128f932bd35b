"""Editors' requests as their sources send them, and their answers read as strictly as they read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tabstop.api.metrics import client_of
from tabstop.config import ServerConfig
from tests.api.test_fim_completions import Editor, editor_of
from tests.text.fim_vocabularies import any_family


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    yield from editor_of(any_family(tmp_path_factory.mktemp("qwen"), "qwen"))


def sse(editor: Editor, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Events as a client without tolerance reads them: `data: ` and JSON, or the end."""
    with httpx.stream("POST", editor.running.url + path, json=body) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: "), line
                if line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))


# ---- llama.vim and llama.vscode

VIM = {
    "id_slot": 0, "input_prefix": "import os\n", "input_suffix": "\nprint(f(1))\n",
    "input_extra": [{"text": "A = 1\n", "time": 12.5, "filename": "a.py"}], "prompt": "def f(", "n_predict": 128,
    "stop": [], "n_indent": 0, "top_k": 40, "top_p": 0.90, "samplers": ["top_k", "top_p", "infill"], "stream": False,
    "cache_prompt": True, "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
    "response_fields": [
        "content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms",
        "timings/prompt_per_second", "timings/predicted_n", "timings/predicted_ms",
        "timings/predicted_per_token_ms", "timings/predicted_per_second", "truncated", "tokens_cached",
    ],
}  # fmt: skip


def test_llama_vim(qwen: Editor) -> None:
    qwen.say("x):\n    return x", end="<|fim_pad|>")
    answer = qwen.post("/infill", **VIM)
    assert set(answer) == set(VIM["response_fields"])
    assert answer["content"] == "x):\n    return x" and answer["truncated"] is False
    assert answer["timings/prompt_n"] > 0 and answer["timings/predicted_per_second"] > 0
    assert qwen.prompt == (
        "<|repo_name|>repository\n<|file_sep|>a.py\nA = 1\n<|file_sep|>file\n"
        "<|fim_prefix|>import os\ndef f(<|fim_suffix|>\nprint(f(1))\n<|fim_middle|>"
    )


def test_llama_vim_warms_the_cache(qwen: Editor) -> None:
    warm_up = VIM | {"n_predict": 0, "samplers": [], "t_max_prompt_ms": 1, "t_max_predict_ms": 1}
    num_before = qwen.running.engine.num_generated
    assert qwen.post("/infill", **warm_up | {"response_fields": [""]}) == {}
    assert qwen.running.engine.num_generated == num_before
    timings = qwen.post("/infill", **warm_up | {"response_fields": ["timings"]})["timings"]
    assert timings["prompt_ms"] > 0 and timings["predicted_ms"] == 0, "it is nothing but its prompt"
    qwen.say("x")
    answer = qwen.post("/infill", **{name: value for name, value in VIM.items() if name != "response_fields"})
    assert answer["timings"]["cache_n"] > 0 and answer["stop"] is True and answer["stop_type"] == "eos"


def test_indents_end_an_infill(qwen: Editor) -> None:
    qwen.say("x):\n    a = 1\nb = 2\n")
    answer = qwen.post("/infill", **VIM | {"n_indent": 4, "response_fields": ["content", "stop_type"]})
    assert answer == {"content": "x):\n    a = 1\n", "stop_type": "limit"}


def test_llama_vscode(qwen: Editor) -> None:
    """Asks what the server is, then for three completions, of which equal ones are one."""
    url = qwen.running.url
    assert httpx.get(url + "/props").json()["default_generation_settings"]["n_ctx"] == 4096
    assert httpx.get(url + "/health").status_code == 200 and len(httpx.get(url + "/slots").json()) == 64
    tokens = qwen.post("/tokenize", content="def f", add_special=False, parse_special=True)["tokens"]
    assert tokens == qwen.tokenizer.encode("def f")
    qwen.say("a = 1", "a  =  1", "b = 2", end="<|fim_pad|>")
    body = VIM | {"n_cmpl": 3, "lora": [{"id": 0, "scale": 1.0}], "top_p": 0.99, "response_fields": ["content"]}
    assert qwen.post("/infill", **body) == [{"content": "a = 1"}, {"content": "b = 2"}]
    missing = httpx.post(url + "/apply-template", json={"messages": [{"role": "user", "content": "hi"}]})
    assert missing.json()["error"]["code"] == "not_supported"


def test_templates_are_applied(tmp_path: Path) -> None:
    from tests.api.serving import text_checkpoint

    for editor in editor_of(text_checkpoint(tmp_path)):
        answer = editor.post("/apply-template", messages=[{"role": "user", "content": "hi"}])
        assert answer == {"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}


# ---- Mistral's path: Continue, minuet, Tabby's server


def test_continue_as_a_codestral_client(qwen: Editor) -> None:
    qwen.say("return 1", end="<|fim_pad|>")
    body = {"model": "codestral-latest", "prompt": "def f():\n", "suffix": "", "max_tokens": 64, "temperature": 0.01,
            "top_p": 1, "stop": ["[PREFIX]", "\n+++++ "], "stream": True}  # fmt: skip
    events = list(sse(qwen, "/v1/fim/completions", body))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "return 1"
    assert events[-1]["choices"][0]["finish_reason"] == "stop" and events[-1]["tabstop"]["fim"] == "qwen"
    assert qwen.prompt == "<|fim_prefix|>def f():\n<|fim_suffix|>\n<|fim_middle|>"


def test_tabbys_server_as_a_mistral_client(qwen: Editor) -> None:
    qwen.say("x")
    answer = qwen.post(
        "/v1/fim/completions", prompt="a", suffix="b", random_seed=7, temperature=0.1, max_tokens=8, min_tokens=0
    )
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "x"} and choice["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion" and answer["usage"]["completion_tokens"] == 1
    assert qwen.running.engine.submitted[-1].sampling.seed == 7


def test_tabbys_server_as_an_openai_client(qwen: Editor) -> None:
    """Every event must have choices: it panics on one that it cannot read."""
    qwen.say("x y")
    body = {"model": "m", "prompt": "a", "suffix": "b", "max_tokens": 9, "temperature": 0.1, "stream": True,
            "presence_penalty": 0.0}  # fmt: skip
    events = list(sse(qwen, "/v1/completions", body))
    assert all(event["choices"] for event in events)
    assert "".join(event["choices"][0]["text"] for event in events) == "x y"


def test_tabbys_server_as_a_llama_cpp_client(qwen: Editor) -> None:
    qwen.say("x y")
    body = {"seed": 3, "prompt": "<fim_prefix>a<fim_suffix>b<fim_middle>", "n_predict": 9, "temperature": 0.1,
            "stream": True, "penalty_last_n": 0, "presence_penalty": 0.0}  # fmt: skip
    events = list(sse(qwen, "/completion", body))
    assert [type(event["content"]) for event in events] == [str] * len(events)
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert "".join(event["content"] for event in events) == "x y" and events[-1]["timings"]["predicted_n"] == 3
    assert qwen.prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


# ---- OpenAI's path: Zed, minuet, Continue, Twinny, llm-ls


class ZedUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ZedChoice(msgspec.Struct):
    text: str
    finish_reason: str


class ZedAnswer(msgspec.Struct):
    """Every field is required there."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ZedChoice]
    usage: ZedUsage


def test_zed(qwen: Editor) -> None:
    qwen.say("x", end="<|file_sep|>")
    body = {"model": "m", "prompt": "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "max_tokens": 64,
            "temperature": 0.2, "stop": ["<|endoftext|>", "<|file_sep|>", "<|fim_pad|>", "<|fim_prefix|>"]}  # fmt: skip
    response = httpx.post(qwen.running.url + "/v1/completions", json=body)
    answer = msgspec.json.decode(response.content, type=ZedAnswer)
    assert answer.choices[0].text == "x" and answer.choices[0].finish_reason == "stop"


def test_minuet_asks_three_times_at_once(qwen: Editor) -> None:
    qwen.say("return x", end="<|fim_pad|>")
    body = {"model": "m", "stream": True, "prompt": "# language: python\ndef f(x):\n    ", "suffix": "\n",
            "max_tokens": 32, "stop": ["\n\n"]}  # fmt: skip

    def ask(_: int) -> str:
        return "".join(event["choices"][0]["text"] for event in sse(qwen, "/v1/completions", body))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == ["return x"] * 3
    qwen.running.assert_idle()


def test_continue_with_another_familys_template_and_many_stops(qwen: Editor) -> None:
    """An unknown model's name makes it send StarCoder's markers."""
    qwen.say("return", end="<|fim_pad|>")
    stops = [
        *("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>", "</fim_middle>", "</code>"),
        *("\n\n\n", "t.", "/src/", "#- coding: utf-8", "```"),
    ]
    body = {"model": "m", "prompt": "<fim_prefix>a<fim_suffix>b<fim_middle>", "max_tokens": 4096 - 200,
            "temperature": 0.01, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "stop": stops,
            "stream": True}  # fmt: skip
    events = list(sse(qwen, "/v1/completions", body))
    assert "".join(event["choices"][0]["text"] for event in events) == "return"
    assert events[-1]["tabstop"]["transcoded"].startswith("starcoder")


def test_continue_asks_what_is_served(qwen: Editor) -> None:
    """Its vLLM provider reads the first model's name and context; its llama.cpp provider streams `content`."""
    first = httpx.get(qwen.running.url + "/v1/models").json()["data"][0]
    assert first["id"] == "m" and first["max_model_len"] == 4096
    qwen.say("return x", end="<|fim_pad|>")
    body = {"model": "m", "prompt": "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "stream": True, "n_predict": 99,
            "stop": ["<|fim_pad|>", "/src/"], "top_k": 100, "frequency_penalty": 0, "temperature": 0.01}  # fmt: skip
    assert "".join(event["content"] for event in sse(qwen, "/completion", body)) == "return x"


class TwinnyChoice(msgspec.Struct):
    text: str


class TwinnyChunk(msgspec.Struct):
    """What it reads of a line's JSON, after the prefix of an event."""

    choices: list[TwinnyChoice]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        "<fim_prefix>a<fim_suffix>b<fim_middle>",
        "<PRE> a <SUF>b <MID>",
        "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>",
    ],
)
def test_twinny(qwen: Editor, prompt: str) -> None:
    """Ollama's body on OpenAI's path, in whichever template; its limits are in `options`; it reads line by line."""
    said = "x = 1 " * 8
    qwen.say(said, end="<|fim_pad|>")
    body = {"model": "m", "prompt": prompt, "stream": True, "keep_alive": "5m",
            "options": {"temperature": 0.2, "num_predict": 512}}  # fmt: skip
    with httpx.stream("POST", qwen.running.url + "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [msgspec.json.decode(line, type=TwinnyChunk) for line in lines[:-1]]
    assert "".join(chunk.choices[0].text for chunk in chunks) == said, "its own limit, not sixteen tokens"
    assert qwen.prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    submit = qwen.running.engine.submitted[-1]
    assert submit.limits.max_tokens == 512 and submit.sampling.temperature == 0.2


def test_what_a_body_says_itself_wins_over_options(qwen: Editor) -> None:
    qwen.say("x y z")
    options = {"num_predict": 3, "temperature": 0.5, "stop": "z", "seed": 4, "top_k": 7, "top_p": 0.5, "num_ctx": 4096}
    qwen.post(prompt="a", max_tokens=5, temperature=0, seed=9, options=options)
    submit = qwen.running.engine.submitted[-1]
    assert (submit.limits.max_tokens, submit.sampling.temperature, submit.sampling.seed) == (5, 0, 9)
    assert (submit.sampling.top_k, submit.sampling.top_p) == (7, 0.5)
    assert qwen.post(prompt="a", max_tokens=9, options=options)["choices"][0]["text"] == "x y "
    qwen.post(prompt="a", options={"num_predict": -1})
    assert qwen.running.engine.submitted[-1].limits.max_tokens == 16
    wrong = httpx.post(qwen.running.url + "/v1/completions", json={"prompt": "a", "options": {"num_predict": "x"}})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "options"


class LlmLsGeneration(msgspec.Struct):
    text: str


class LlmLsAnswer(msgspec.Struct):
    choices: list[LlmLsGeneration]


def test_llm_ls(qwen: Editor) -> None:
    """Lays out itself, as StarCoder's, streams nothing, and sends what its user put into request_body."""
    qwen.say("x", end="<|fim_pad|>")
    body = {"model": "bigcode/starcoder2-3b", "prompt": "<fim_prefix>a<fim_suffix>b<fim_middle>", "stream": False,
            "max_tokens": 60, "temperature": 0.2, "top_p": 0.95}  # fmt: skip
    agent = {"user-agent": "llm-ls/0.5.3; rust/unknown; ide/neovim"}
    response = httpx.post(qwen.running.url + "/v1/completions", json=body, headers=agent)
    answer = msgspec.json.decode(response.content, type=LlmLsAnswer)
    assert [choice.text for choice in answer.choices] == ["x"]
    assert qwen.prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"


# ---- what is counted


def test_fills_are_counted(qwen: Editor) -> None:
    qwen.say("x")
    url = qwen.running.url
    agent = {"user-agent": "llm-ls/0.5.3; rust/unknown; ide/neovim"}
    ours = 'tabstop_fill_requests_total{client="llm-ls",family="qwen",model="m"}'
    before = count(httpx.get(url + "/metrics").text, ours)
    httpx.post(url + "/v1/completions", json={"prompt": "retu", "suffix": "b", "token_healing": True}, headers=agent)
    page = httpx.get(url + "/metrics").text
    assert count(page, ours) - before == 1
    for name in ("fill_recomputed_tokens", "healed_tokens"):
        assert f'tabstop_{name}_total{{model="m"}} 0.0' not in page and f"tabstop_{name}_total" in page
    first = count(page, "tabstop_fill_transcoded_total"), count(page, "tabstop_fill_overlaps_total")
    qwen.post(prompt="<fim_prefix>a<fim_suffix>b<fim_middle>", max_tokens=3)
    qwen.say("a\nprint(1) # one\n")
    qwen.post(prompt="x ", suffix="print(1) # one\n", max_tokens=30, n=2)
    page = httpx.get(url + "/metrics").text
    after = count(page, "tabstop_fill_transcoded_total"), count(page, "tabstop_fill_overlaps_total")
    assert (after[0] - first[0], after[1] - first[1]) == (1, 2)
    assert client_of("Mozilla/5.0 what ever") == "other" and client_of("OpenAI/Python 1.2") == "openai"


def count(page: str, name: str) -> float:
    """The sum over all labels."""
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def test_healed_bytes_are_not_text(qwen: Editor) -> None:
    """The engine says the word from its start; the client sees what follows its cursor."""
    qwen.say("return x", end="<|fim_pad|>")
    body: dict[str, Any] = {"prompt": "    retu", "suffix": "\n", "token_healing": True, "max_tokens": 10}
    answer = qwen.post(**body)
    assert answer["choices"][0]["text"] == "rn x" and answer["tabstop"]["healed_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4 and "ret" not in qwen.prompt
    streamed = "".join(event["choices"][0]["text"] for event in sse(qwen, "/v1/completions", body | {"stream": True}))
    assert streamed == "rn x"
    short = qwen.post(**body | {"max_tokens": 2, "n": 2})
    assert [choice["text"] for choice in short["choices"]] == ["rn "] * 2
    assert [choice["finish_reason"] for choice in short["choices"]] == ["length"] * 2


def test_holes_are_healed_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    """Raw prompts are not."""
    for editor in editor_of(any_family(tmp_path, "qwen"), ServerConfig()):
        editor.say("return x", end="<|fim_pad|>")
        body = {"prompt": "    retu", "max_tokens": 10}
        assert editor.post(**body, suffix="\n")["choices"][0]["text"] == "rn x"
        assert editor.post("/v1/fim/completions", **body)["tabstop"]["healed_tokens"] == 2
        assert editor.post("/infill", input_prefix="    ", prompt="retu")["content"] == "rn x"
        assert "healed_tokens" not in editor.post(**body, suffix="\n", token_healing=False)["tabstop"]
        assert editor.post(**body)["choices"][0]["text"] == "return x"


def test_equal_candidates_are_one(qwen: Editor) -> None:
    qwen.say("a", " a", "b")
    answer = qwen.post(prompt="x", suffix="y", n=3, distinct=True)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "a"), (1, "b")]
    refused = httpx.post(
        qwen.running.url + "/v1/completions", json={"prompt": "x", "distinct": True, "stream": True, "n": 2}
    )
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "distinct"


def test_every_sample_is_answered(qwen: Editor) -> None:
    """llama.cpp's array comes for OpenAI's name of the number, too."""
    qwen.say("a", " a", "b")
    for path, hole in (("/infill", {"input_prefix": "x", "input_suffix": "y"}), ("/completion", {"prompt": "x"})):
        assert [one["content"] for one in qwen.post(path, **hole, n=3, seed=1)] == ["a", " a", "b"]
