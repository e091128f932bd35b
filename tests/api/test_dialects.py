"""docs/adding-a-dialect.md is true: its file and a line of the registry are a dialect that has all that others have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tabstop.api.dialects import DIALECTS
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.keys import ADMIN, INFER, Key, digest_of
from tabstop.text.tokenizer import Tokenizer
from tests.api.conftest import SCRIPT
from tests.api.serving import EOS, Running, serving

KEYS = [
    Key(name, digest_of(name).hex(), scopes=scopes, requests_per_minute=rate)
    for name, scopes, rate in (("user", (INFER,), None), ("boss", (INFER, ADMIN), None), ("rare", (INFER,), 1))
]


PAGE = Path(__file__).parents[2] / "docs/adding-a-dialect.md"


@pytest.fixture(scope="module", autouse=True)
def quill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's file, and a copy at other paths: two dialects may call their bodies alike."""
    folder = tmp_path_factory.mktemp("dialects")
    source, registration = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert registration == 'DIALECTS = {"quill": "tabstop.api.dialects.quill"}\n'
    (folder / "quill.py").write_text(source, encoding="utf-8")
    nib = source.replace("/quill", "/nib").replace("    most: ", "    words: int = 0\n    most: ")
    (folder / "nib.py").write_text(nib, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setitem(DIALECTS, "quill", "quill")
        patch.setitem(DIALECTS, "nib", "nib")
        yield


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[Running]:
    engine = FakeEngine(script=scripted([*tokenizer.encode(SCRIPT), EOS]), stop_sets={"eos": frozenset([EOS])})
    with serving(checkpoint, engine, ServerConfig(key_file="keys"), KEYS) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"api-key": "boss"}) as client:
        yield client
    server.assert_idle()


def test_it_answers_whole(client: httpx.Client, tokenizer: Tokenizer) -> None:
    for path in ("/quill", "/v1/quill", "/v1/quill/"):
        answer = client.post(path, json={"say": "x", "most": 50})
        assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
        assert answer.json() == {"by": "tiny", "said": SCRIPT, "tokens": len(tokenizer.encode(SCRIPT)) + 1}
    assert client.post("/quill/count", json={"say": "abc"}).json() == {"tokens": 3}
    assert client.post("/v1/quill/count", json={"say": "abc"}).status_code == 404


def test_it_streams(client: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = client.post("/v1/quill", json={"say": "x", "most": 50, "stream": True})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    first, *lines, last = map(json.loads, answer.text.splitlines())
    assert first == {"by": "tiny"} and last == {"tokens": len(tokenizer.encode(SCRIPT)) + 1}
    assert len(lines) > 1 and "".join(line["said"] for line in lines) == SCRIPT


@pytest.mark.parametrize(
    ("body", "key", "status", "why", "where"),
    [
        ({}, "boss", 400, "invalid_request", "say"),
        ({"say": 1}, "boss", 400, "invalid_request", "say"),
        ({"say": "x", "use_beam_search": True}, "boss", 400, "not_supported", "use_beam_search"),
        ({"say": "x", "most": 5000}, "boss", 400, "context_length_exceeded", "max_tokens"),
        ({"say": "x"}, "wrong", 401, "invalid_api_key", None),
    ],
)
def test_its_errors_have_its_own_form(
    client: httpx.Client, body: dict[str, object], key: str, status: int, why: str, where: str | None
) -> None:
    answer = client.post("/v1/quill", json=body, headers={"api-key": key})
    assert (answer.status_code, answer.json()) == (status, {"wrong": why, "where": where})


def test_its_keys_have_scopes_and_ceilings(client: httpx.Client) -> None:
    refused = client.post("/quill/count", json={"say": "x"}, headers={"api-key": "user"})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "forbidden"  # no form: OpenAI's
    assert client.post("/quill", json={"say": "x"}, headers={"api-key": "user"}).status_code == 200
    assert client.post("/quill", json={"say": "x"}, headers={"api-key": "rare"}).status_code == 200
    again = client.post("/quill", json={"say": "x"}, headers={"api-key": "rare"})
    assert again.status_code == 429 and again.json()["wrong"] == "rate_limit_exceeded" and again.headers["retry-after"]


def test_a_broken_stream_ends_in_its_own_form(checkpoint: Checkpoint) -> None:
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.002)
    with (
        serving(checkpoint, engine) as server,
        httpx.stream("POST", server.url + "/quill", json={"say": "x", "stream": True}) as answer,
    ):
        lines = answer.iter_lines()
        assert json.loads(next(lines)) == {"by": "tiny"}
        server.call(engine.die)
        assert json.loads(list(lines)[-1]) == {"wrong": "engine_dead", "where": None}


def test_the_document_and_the_metrics_have_it(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()

    def body_of(path: str) -> dict[str, Any]:
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        return document["components"]["schemas"][reference.removeprefix("#/components/schemas/")]

    assert document["paths"]["/v1/quill"]["post"]["summary"] == "Say on"
    assert body_of("/v1/quill") == body_of("/quill") and body_of("/quill")["title"] == "QuillBody"
    assert body_of("/quill")["required"] == ["say"] and "top_k" in body_of("/quill")["properties"]
    assert "words" in body_of("/nib")["properties"] and "words" not in body_of("/quill")["properties"]
    assert set(body_of("/quill/count")["properties"]) == {"say", "model"}
    assert "/v1/quill/count" not in document["paths"]
    client.post("/v1/quill", json={"say": "x"})
    page = client.get("/metrics").text
    assert 'tabstop_http_responses_total{route="/v1/quill",status="200"}' in page
    assert 'tabstop_requests_total{model="tiny",outcome="ok"}' in page


def test_the_page_names_only_files_that_exist() -> None:
    names = re.findall(r"`((?:src|tests|docs)/[\w/.]+)`", PAGE.read_text(encoding="utf-8"))
    assert len(names) > 5 and [name for name in names if not (PAGE.parents[1] / name).exists()] == []
