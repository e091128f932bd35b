"""`suffix` on /v1/completions, from JSON to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.text.defaults import stop_sets
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tabstop.types import unpack_ids
from tests.api.serving import Running, serving
from tests.text.fim_vocabularies import any_family
from tests.text.test_fim import spelled

Say = Callable[..., None]


class Editor:
    """A server of one family whose model says what a test tells it to."""

    def __init__(self, running: Running, tokenizer: Tokenizer) -> None:
        self.running, self.tokenizer = running, tokenizer

    def say(self, *texts: str, end: str | None = None) -> None:
        """The next answers, each ended by a token if one is named."""
        ends = [] if end is None else [self.tokenizer.token_id(end)]
        self.running.engine.script = scripted(*([*self.tokenizer.encode(text, control=False), *ends] for text in texts))

    def post(self, path: str = "/v1/completions", /, **body: Any) -> Any:
        response = httpx.post(self.running.url + path, json=body)
        assert response.status_code == 200, response.text
        self.running.assert_idle()
        return response.json()

    def events(self, path: str = "/v1/completions", /, **body: Any) -> list[dict[str, Any]]:
        response = httpx.post(self.running.url + path, json=body | {"stream": True})
        lines = response.text.strip().split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]

    @property
    def prompt(self) -> str:
        """What the engine was asked last, markers spelled."""
        return spelled(self.tokenizer, unpack_ids(self.running.engine.submitted[-1].prompt_ids))


UNHEALED = ServerConfig(token_healing="off")
"""A script says what follows the cursor; tests of healing ask for it."""


def editor_of(checkpoint: Checkpoint, config: ServerConfig = UNHEALED) -> Iterator[Editor]:
    tokenizer = load_tokenizer(checkpoint)
    with serving(checkpoint, FakeEngine(stop_sets=stop_sets(checkpoint, tokenizer)), config) as running:
        yield Editor(running, tokenizer)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    yield from editor_of(any_family(tmp_path_factory.mktemp("qwen"), "qwen"))


@pytest.fixture(scope="module")
def codellama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    yield from editor_of(any_family(tmp_path_factory.mktemp("codellama"), "codellama"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    from tests.api.serving import text_checkpoint

    yield from editor_of(text_checkpoint(tmp_path_factory.mktemp("plain")))


def test_a_suffix_is_laid_out_and_the_family_named(qwen: Editor) -> None:
    qwen.say("return x", end="<|file_sep|>")
    answer = qwen.post(prompt="def f(x):\n    ", suffix="\n", max_tokens=20)
    assert qwen.prompt == "<|fim_prefix|>def f(x):\n    <|fim_suffix|>\n<|fim_middle|>"
    assert answer["choices"][0]["text"] == "return x" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0].get("stop_reason") is None
    assert answer["tabstop"] == {"fim": "qwen", "order": "psm"}
    card = httpx.get(qwen.running.url + "/v1/models").json()["data"][0]
    assert card["fim"] == "qwen"


def test_streams_say_it_with_the_end(qwen: Editor) -> None:
    qwen.say("return", end="<|fim_pad|>")
    events = qwen.events(prompt="a", suffix="b", max_tokens=20, stream_options={"include_usage": True})
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == "return"
    (ended,) = [event for event in events if event["choices"] and event["choices"][0]["finish_reason"]]
    assert ended["tabstop"]["fim"] == "qwen" and sum("tabstop" in event for event in events) == 1


@pytest.mark.parametrize("name", ["<|file_sep|>", "<|fim_middle|>", "<|im_start|>"])
def test_users_cannot_spell_markers_beside_a_suffix(qwen: Editor, name: str) -> None:
    qwen.say(name)
    answer = qwen.post(prompt=f"a {name}", suffix=f"{name} b", files=[{"path": name, "text": name}], max_tokens=50)
    ids = unpack_ids(qwen.running.engine.submitted[-1].prompt_ids)
    control = set(qwen.tokenizer.control_tokens.values())
    assert sum(token_id in control for token_id in ids) == 6 and qwen.prompt.count(name) >= 4
    assert answer["choices"][0]["text"] == name
    qwen.post(prompt=f"a{name}", max_tokens=1)
    ids = unpack_ids(qwen.running.engine.submitted[-1].prompt_ids)
    assert sum(token_id in control for token_id in ids) == 1


def requests_with(text: str) -> list[tuple[str, dict[str, Any]]]:
    """On each path that fills holes, `text` in every field that is text."""
    file = {"path": text, "text": text}
    around = {"files": [file, file], "repo_name": text, "path": text, "language": text, "max_tokens": 3}
    infill = {
        "input_prefix": text,
        "input_suffix": text,
        "prompt": text,
        "input_extra": [{"filename": text, "text": text}],
    }
    return [
        ("/v1/completions", {"prompt": text, "suffix": text, **around}),
        ("/v1/fim/completions", {"prompt": text, "suffix": text, **around}),
        ("/infill", infill | around),
    ]


@pytest.mark.parametrize("family", ["qwen", "starcoder2", "codellama", "mistral", "codegeex", "deepseek"])
def test_every_special_token_in_every_field_is_text(family: str, tmp_path: Path) -> None:
    """As many control tokens as around harmless text, and no client's stop is needed for what they spell."""
    for editor in editor_of(any_family(tmp_path, family)):
        editor.say("x")
        expected = num_control_tokens(editor, "x y")
        assert min(expected) >= 3 - (family == "mistral")
        for name in editor.tokenizer.control_tokens:
            assert num_control_tokens(editor, f"x {name}y{name}") == expected, name


def num_control_tokens(editor: Editor, text: str) -> list[int]:
    """Of what the engine was asked on each path."""
    control, found = set(editor.tokenizer.control_tokens.values()), []
    for path, body in requests_with(text):
        editor.post(path, **body)
        ids = unpack_ids(editor.running.engine.submitted[-1].prompt_ids)
        found.append(sum(token_id in control for token_id in ids))
    return found


def test_an_empty_suffix_asks_for_no_hole_here(qwen: Editor) -> None:
    """Clients send it beside prompts that they laid out. On the paths for holes it is the end of a file."""
    qwen.say("x", end="<|fim_pad|>")
    laid_out = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    for suffix in ("", None):
        answer = qwen.post(prompt=laid_out, suffix=suffix, max_tokens=9)
        assert qwen.prompt == laid_out and "tabstop" not in answer and answer["choices"][0]["text"] == "x"
    for path, body in (("/v1/fim/completions", {"prompt": "a "}), ("/infill", {"input_prefix": "a "})):
        assert qwen.post(path, **body, max_tokens=9)["tabstop"]["fim"] == "qwen"
        assert qwen.prompt == "<|fim_prefix|>a <|fim_suffix|>\n<|fim_middle|>"
    answer = qwen.post(prompt="a ", suffix="", files=[{"path": "b.py", "text": "B"}], max_tokens=9)
    assert answer["tabstop"]["fim"] == "qwen" and qwen.prompt.endswith("a <|fim_suffix|>\n<|fim_middle|>")


def test_a_prompt_that_its_client_laid_out_stops_like_one(qwen: Editor) -> None:
    qwen.say("x", end="<|file_sep|>")
    answer = qwen.post(prompt="<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", max_tokens=9)
    assert answer["choices"][0]["text"] == "x" and answer["choices"][0]["finish_reason"] == "stop"
    assert qwen.running.engine.submitted[-1].limits.stop_sets == ("eos", "fim") and "tabstop" not in answer
    qwen.post(prompt="a", max_tokens=1)
    assert qwen.running.engine.submitted[-1].limits.stop_sets == ("eos",)


def test_the_instruct_models_cursor_is_not_text(qwen: Editor) -> None:
    qwen.say("return x<|cursor|>more")
    answer = qwen.post(prompt="a", suffix="b", max_tokens=50)
    assert answer["choices"][0]["text"] == "return x" and "stop_reason" not in answer["choices"][0]


def test_codellamas_blanks(codellama: Editor) -> None:
    codellama.say("ret x", end="▁<EOT>")
    codellama.post(prompt="def x", suffix="  x", max_tokens=9)
    assert codellama.prompt == "<s>▁<PRE> def x▁<SUF>  x▁<MID>"


def test_a_model_without_markers_says_so(plain: Editor, caplog: pytest.LogCaptureFixture) -> None:
    plain.say("return")
    for _ in range(2):
        answer = plain.post(prompt="def f", suffix="b", max_tokens=5)
        assert answer["tabstop"] == {"fim": False} and plain.prompt == "def f"
    assert [record.message for record in caplog.records].count(
        "tiny has no fill-in-the-middle tokens: prefixes are continued, suffixes ignored"
    ) == 1
    assert httpx.get(plain.running.url + "/v1/models").json()["data"][0]["fim"] is False


def test_a_repeated_suffix_is_cut_while_streaming(qwen: Editor) -> None:
    suffix = "\n    total = a + b\n    return total\n"
    qwen.say("    a = 1" + suffix + "print(1)")
    body = {"prompt": "def f():\n", "suffix": suffix, "max_tokens": 100}
    answer = qwen.post(**body)
    assert answer["choices"][0]["text"] == "    a = 1" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 60
    events = qwen.events(**body)
    assert "".join(event["choices"][0]["text"] for event in events) == "    a = 1"
    qwen.say("    a = 1" + suffix.rstrip("\n"), end="<|fim_pad|>")
    assert "".join(event["choices"][0]["text"] for event in qwen.events(**body)) == "    a = 1"
    qwen.say("    a = 1\n")
    assert qwen.post(prompt="x", suffix="\n)\n", max_tokens=50)["choices"][0]["text"] == "    a = 1\n"


def test_crlf_files_get_crlf_back(qwen: Editor) -> None:
    qwen.say("a\nb\n")
    answer = qwen.post(prompt="x\r\n", suffix="y\r\n", max_tokens=50)
    assert answer["choices"][0]["text"] == "a\r\nb\r\n" and "\r" not in qwen.prompt


def test_foreign_layouts_are_transcoded(qwen: Editor, tmp_path: Path) -> None:
    qwen.say("x", end="<|fim_pad|>")
    answer = qwen.post(prompt="<fim_prefix>a<fim_suffix>b<fim_middle>", max_tokens=9)
    assert qwen.prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    assert answer["tabstop"]["transcoded"] == "starcoder2" or answer["tabstop"]["transcoded"] == "starcoder"
    checkpoint = any_family(tmp_path, "qwen")
    for editor in editor_of(checkpoint, ServerConfig(transcode_fim=False, token_healing="off")):
        editor.say("x")
        assert "tabstop" not in editor.post(prompt="<fim_prefix>a<fim_suffix>b<fim_middle>", max_tokens=9)
        assert editor.prompt == "<fim_prefix>a<fim_suffix>b<fim_middle>"


def test_a_prompt_whose_tokens_are_shown_stays_as_it_is(qwen: Editor) -> None:
    foreign = "<fim_prefix>a<fim_suffix>b<fim_middle>"
    for options in ({"prompt_logprobs": 0}, {"echo": True, "logprobs": 0}):
        qwen.say("x")
        answer = qwen.post(prompt=foreign, max_tokens=9, **options)
        assert qwen.prompt == foreign and "tabstop" not in answer


def test_what_was_cut_is_reported(qwen: Editor) -> None:
    qwen.say("x")
    lines = "".join(f"line {n}\n" for n in range(900))
    answer = qwen.post(prompt=lines, suffix="b", max_tokens=20, path="c.py")
    assert answer["tabstop"]["cut_tokens"].keys() == {"prefix"}
    assert answer["usage"]["prompt_tokens"] <= 4096 - 20
