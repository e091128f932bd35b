"""Prompts, keys and completions are in nothing that a server writes but its answers; --log-prompts is the exception.

Everything is collected: log lines of both forms at level debug, metrics, the bodies of all errors, what processes
print, the files that they leave or make, their command lines and environments.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tabstop import logs
from tabstop.api.dialects import dialect_routes
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.delivery import DeltaStream
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.keys import Key, append_key, digest_of
from tabstop.text.tokenizer import load_tokenizer
from tabstop.types import Delta, Submit
from tests.api.serving import EOS, Running, serving, text_checkpoint
from tests.engine import stub_core
from tests.test_supervisor import PATIENCE, Server, model, until

assert model  # a fixture

PROMPT, COMPLETION, KEY = "zqPromptZq", "zqCompletionZq", "sk-tabstop-zqKeyZq"
PLACES = {
    "/v1/completions": "CompletionBody",
    "/v1/chat/completions": "ChatBody",
    "/v1/fim/completions": "MistralBody",
    "/infill": "InfillBody",
    "/completion": "LlamaCompletionBody",
    "/tokenize": "TokenizeBody",
    "/detokenize": "DetokenizeBody",
    "/apply-template": "TemplateBody",
}
SHAPES: tuple[Any, ...] = (PROMPT, [PROMPT], {PROMPT: PROMPT}, [{"type": PROMPT, PROMPT: 1}])


ENDS = re.compile("zqpr|zqco|zqke|ptzq|onzq|eyzq", re.IGNORECASE)
"""Of secrets that were cut, too; shorter ones stand by chance in the names of temporary folders."""


def found_in(text: str) -> list[str]:
    """The lines that hold a secret."""
    return [line for line in text.splitlines() if ENDS.search(line)]


class Faulty(FakeEngine):
    """Fails with the request's own words when it is asked to, as careless code would."""

    fault = ""

    def submit(self, submit: Submit) -> DeltaStream:
        if self.fault == "submit":
            raise KeyError(f"no {PROMPT} here")
        stream = super().submit(submit)
        return failing() if self.fault == "stream" else stream  # type: ignore[return-value]


async def failing() -> AsyncIterator[Delta]:
    raise ValueError(f"{COMPLETION} cannot be read")
    yield


@contextmanager
def recorded(form: str, *, prompts: bool = False) -> Iterator[io.StringIO]:
    """All log lines of this process, at level debug."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    logs.configure(logs.LogSettings("debug", form, prompts), "front end", stream)
    try:
        yield stream
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@contextmanager
def talking(checkpoint: Checkpoint, **options: Any) -> Iterator[Running]:
    """A server whose every answer is COMPLETION."""
    ids = load_tokenizer(checkpoint).encode(COMPLETION)
    engine = Faulty(script=scripted([*ids, EOS]), stop_sets={"eos": frozenset([EOS])})
    with serving(checkpoint, engine, ServerConfig(api_key=KEY, **options)) as running:
        yield running


def minimal(place: str) -> dict[str, Any]:
    """The smallest body that is good there, with a prompt."""
    if place in ("/v1/chat/completions", "/apply-template"):
        return {"messages": [{"role": "user", "content": PROMPT}]}
    return {"tokens": [1, 2]} if place == "/detokenize" else {"prompt": PROMPT, "input_prefix": PROMPT}


def bodies() -> Iterator[tuple[str, bytes]]:
    """Every field of every body with a secret in every shape, then what is no body at all."""
    kinds = {route.body.__name__: route.body for route in dialect_routes() if route.body}
    assert set(PLACES.values()) == set(kinds)
    for place, name in PLACES.items():
        for field in msgspec.structs.fields(kinds[name]):
            for shape in SHAPES:
                yield place, json.dumps(minimal(place) | {field.encode_name: shape}).encode()
        whole = json.dumps(minimal(place) | {"zqFieldZq": 1}).encode()
        yield place, whole
        yield place, whole[: whole.index(b"zq") + 4]
        yield place, whole.replace(b"zqP", b"zq\xffP")
        yield place, whole.replace(b'"zqP', b'\\"zqP')
        yield place, json.dumps(PROMPT).encode()


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_field_of_any_body_comes_back_or_is_logged(checkpoint: Checkpoint, form: str) -> None:
    statuses: dict[int, int] = {}
    wrong = []
    with (
        recorded(form) as log,
        talking(checkpoint) as running,
        httpx.Client(base_url=running.url, headers={"api-key": KEY}, timeout=60) as client,
    ):
        for place, body in bodies():
            response = client.post(place, content=body)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            if response.status_code != 200 and found_in(response.text):
                wrong.append((place, body, response.text))
        metrics = client.get("/metrics").text
    assert [(place, body[-60:], text[:120]) for place, body, text in wrong][:9] == []
    assert found_in(metrics) == [] and found_in(log.getvalue()) == []
    assert set(statuses) == {200, 400} and statuses[400] > 300
    assert log.getvalue().count("answered") >= statuses[200] / 2  # the log was there to be read


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": KEY},
        {"x-token": KEY},
        {"cookie": f"key={KEY}"},
        {"x-api-key": f"{KEY}\t{KEY}"},
        {"referer": f"http://localhost/?key={KEY}", "user-agent": KEY},
        {"api-key": KEY, "x-priority": PROMPT, "x-deadline-ms": PROMPT, "x-session-id": PROMPT},
        {"api-key": KEY, "content-encoding": PROMPT},
        {"api-key": KEY, "accept": PROMPT, "content-type": PROMPT, "x-forwarded-for": PROMPT},
    ],
)
def test_no_header_and_no_path_comes_back_or_is_logged(checkpoint: Checkpoint, headers: dict[str, str]) -> None:
    with recorded("text") as log, talking(checkpoint) as running, httpx.Client(base_url=running.url) as client:
        body = {"prompt": PROMPT}
        answers = [
            client.post("/v1/completions", json=body, headers=headers),
            client.post(f"/v1/completions?key={KEY}", json=body, headers=headers),
            client.get(f"/v1/models/{KEY}", headers=headers),
            client.get(f"/{KEY}", headers=headers),
            client.options(f"/{KEY}", headers=headers),
            client.request(PROMPT, "/v1/models", headers=headers),
        ]
        errors = [answer for answer in answers if answer.status_code != 200]
        assert len(errors) >= 4
        for answer in errors:
            assert found_in(answer.text) == [] and found_in(str(answer.headers)) == []
        assert found_in(client.get("/metrics", headers={"api-key": KEY}).text) == []
    assert found_in(log.getvalue()) == []


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("fault", ["submit", "stream"])
def test_a_bug_shows_where_and_not_with_what(checkpoint: Checkpoint, fault: str, form: str) -> None:
    with recorded(form) as log, talking(checkpoint) as running:
        engine: Any = running.engine
        engine.fault = fault
        for stream in (False, True):
            body = {"prompt": PROMPT, "stream": stream}
            failed = httpx.post(running.url + "/v1/completions", json=body, headers={"api-key": KEY})
            assert failed.status_code == 500 and found_in(failed.text) == []
        engine.fault = ""
    text = log.getvalue()
    assert "Traceback" in text and "test_secrets.py" in text and logs.WITHHELD in text
    assert [line for line in found_in(text) if "{PROMPT}" not in line and "{COMPLETION}" not in line] == []


def test_log_prompts_is_the_exception(checkpoint: Checkpoint) -> None:
    with recorded("text", prompts=True) as log, talking(checkpoint, log_prompts=True) as running:
        httpx.post(running.url + "/v1/completions", json={"prompt": PROMPT}, headers={"api-key": KEY})
    text = log.getvalue().replace("[0]", "")  # where a delta began
    assert PROMPT in text and COMPLETION in text and KEY not in text


# ---- processes

ASCII = "+,-./0123456"
"""The stub core counts bytes up from the length of the prompt."""


@pytest.fixture
def running(model: Path, tmp_path: Path) -> Iterator[Server]:
    path = tmp_path / "keys"
    append_key(path, Key("someone", digest_of(KEY).hex(), ("infer", "admin"), max_concurrent=50, tokens_per_minute=1e6))
    server = Server(model, key_file=str(path), num_front_ends=2, log_level="debug")
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def everything_of(server: Server) -> str:
    """Files of the server's temporary folder, and what the system tells of its processes."""
    pieces = []
    for folder, _, names in os.walk(server.scratch):
        for name in names:
            path = Path(folder, name)
            pieces.append(str(path))
            if path.is_file():
                pieces.append(path.read_bytes().decode("latin-1"))
    for pid in server.pids:
        pieces += [Path(f"/proc/{pid}/{name}").read_bytes().decode("latin-1") for name in ("cmdline", "environ")]
    return "\n".join(pieces)


def test_nothing_that_processes_write_holds_a_secret(running: Server) -> None:
    until(lambda: len(running.front_ends) == 2, "two front ends")
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=PATIENCE) as client:
        said = client.post("/v1/completions", json={"prompt": f"{PROMPT:>60}", "max_tokens": 40}).json()
        assert ASCII in said["choices"][0]["text"], said
        for body in (b'{"prompt": "' + PROMPT.encode(), json.dumps({"prompt": PROMPT, "n": PROMPT}).encode()):
            assert client.post("/v1/completions", content=body).status_code == 400
        client.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"})
        written = everything_of(running) + client.get("/metrics").text
        assert "tabstop_requests_total" in written and digest_of(KEY).hex() in written  # it was there to be read
        for pid in running.pids:
            assert re.search(r"^Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
        crash = {"prompt": [stub_core.CRASH, *PROMPT.encode()], "max_tokens": 5}
        failed = client.post("/v1/completions", json=crash)
        assert failed.status_code >= 500 and found_in(failed.text) == []
    code, errors = running.end()
    assert code == 70 and "planted fault" in errors and "Traceback" in errors
    for text in (written, errors):
        assert found_in(text) == [] and ASCII not in text
