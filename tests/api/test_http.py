"""Routes, errors, keys and hostile requests over real sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tabstop.api.dialects import dialect_routes
from tabstop.api.dialects.tokens import MAX_CHARACTERS
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.text.tokenizer import Tokenizer
from tests.api.conftest import SCRIPT
from tests.api.serving import EOS, Running, serving

KEY = "sk-correct-horse"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response that must be in OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body["error"]


# ---- routes


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/v1/completions/", "/completions///"])
def test_paths_with_and_without_v1(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json={"prompt": "x", "max_tokens": 50}).json()
    assert answer["choices"][0]["text"] == SCRIPT
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["model"] == "tiny"


def test_request_ids_are_kept_or_made(client: httpx.Client) -> None:
    assert client.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/nowhere").headers["x-request-id"]
    assert len(made) == 32
    for odd in ("x" * 129, "a b", "a\tb"):
        assert client.get("/version", headers={"x-request-id": odd}).headers["x-request-id"] != odd


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"], card["root"]) == ("tiny", "model", 4096, "tiny")
    assert client.get("/v1/models/tiny").json() == card
    assert error_of(client.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_small_things(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == client.get("/health").status_code == 200
    head = client.head("/readyz")
    assert head.status_code == 200 and head.content == b"" and head.headers["x-request-id"]
    assert set(client.get("/version").json()) == {"version"}
    assert error_of(client.get("/nowhere"), 404)["code"] == "not_found"
    wrong = client.get("/v1/completions")
    assert error_of(wrong, 405)["code"] == "method_not_allowed" and wrong.headers["allow"] == "POST"


def test_openapi_describes_the_bodies(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {route.body.__name__ for route in dialect_routes() if route.body} <= set(document["components"]["schemas"])
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    n = document["components"]["schemas"]["CompletionBody"]["properties"]["n"]["anyOf"][0]
    assert n == {"type": "integer", "minimum": 1, "maximum": 1024}


def test_tokenize_and_detokenize(client: httpx.Client, tokenizer: Tokenizer) -> None:
    text = "def f(é): return<|im_end|>"
    answer = client.post("/tokenize", json={"prompt": text}).json()
    assert answer["tokens"] == tokenizer.encode(text) and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4096
    assert [text[start:end] for start, end in answer["offsets"]][-1] == "<|im_end|>"
    pieces = client.post("/tokenize", json={"content": "é<|im_end|>", "with_pieces": True}).json()["tokens"]
    assert pieces == [{"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}, {"id": EOS, "piece": "<|im_end|>"}]
    plain = client.post("/tokenize", json={"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert EOS not in plain
    back = client.post("/v1/detokenize", json={"tokens": [100, 0xC3, 0xA9, 101]}).json()
    assert back == {"prompt": "déE"[:2] + "e", "content": "dée", "offsets": [[0, 1], [1, 1], [1, 2], [2, 3]]}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"][-1] == tokenizer.encode("\n")[0]
    assert error_of(client.post("/tokenize", json={}), 400)["param"] == "prompt"


def test_what_is_tokenized_at_once_is_bounded(client: httpx.Client) -> None:
    long = "x" * (MAX_CHARACTERS + 1)
    for name, value in (("prompt", long), ("content", long), ("messages", [{"role": "user", "content": long}])):
        error = error_of(client.post("/tokenize", json={name: value}), 400)
        assert error["param"] == name and f"at most {MAX_CHARACTERS}" in error["message"]
    assert error_of(client.post("/detokenize", json={"tokens": [65] * len(long)}), 400)["param"] == "tokens"


# ---- errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"", None),
        (b"[]", None),
        (b'{"prompt":"\xff"}', None),
        (b'{"prompt":"\\ud800 "}', None),
        (b'{"prompt":"x","temperature":NaN}', None),
        (b'{"prompt":"x","temperature":Infinity}', None),
        (b'{"prompt":"x","temperature":1e999}', "temperature"),
        (b'{"prompt":"x","temperature":-1}', "temperature"),
        (b'{"prompt":"x","top_p":1.5}', "top_p"),
        (b'{"prompt":"x","n":1000000000}', "n"),
        (b'{"prompt":"x","n":33}', "n"),
        (b'{"prompt":"x","n":0}', "n"),
        (b'{"prompt":"x","n":true}', "n"),
        (b'{"prompt":"x","max_tokens":-1}', "max_tokens"),
        (b'{"prompt":"x","max_tokens":9223372036854775808}', "max_tokens"),
        (b'{"prompt":"x","max_tokens":1e2}', "max_tokens"),
        (b'{"prompt":"x","max_tokens":4096}', "max_tokens"),
        (b'{"prompt":"x","seed":9223372036854775808}', "seed"),
        (b'{"prompt":"x","stop":' + json.dumps(["s"] * 3 + list(map(str, range(100_000)))).encode() + b"}", "stop"),
        (b'{"prompt":"x","stop":["' + b"s" * 1_000_000 + b'"]}', "stop"),
        (b'{"prompt":"x","stop":""}', "stop"),
        (b'{"prompt":"x","stop_token_ids":[-1]}', "stop_token_ids"),
        (b'{"prompt":"x","stop_token_ids":[4294967296]}', "stop_token_ids"),
        (b'{"prompt":[4294967296]}', "prompt"),
        (b'{"prompt":[262144]}', "prompt"),
        (b'{"prompt":[' + b"1," * 1_000_000 + b"1]}", "prompt"),
        (b'{"prompt":[' + b'"x",' * 100_000 + b'"x"]}', "prompt"),
        (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "prompt"),
        (b'{"prompt":"x","response_format":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"prompt":"x","unknown":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", None),
        (b'{"prompt":"' + b"a" * 4_000_000 + b'"}', "prompt"),
        (b'{"prompt":"x","model":"' + b"a" * 2000 + b'"}', "model"),
        (b'{"prompt":"x","session":7}', "session"),
        (b'{"prompt":"x","deadline_ms":0}', "deadline_ms"),
        (b'{"prompt":"x","timeout":0}', "timeout"),
        (b'{"prompt":[1,2],"suffix":"y"}', "prompt"),
        (b'{"prompt":"x","suffix":7}', "suffix"),
        (b'{"prompt":"x","suffix":"y","fim_order":"mps"}', "fim_order"),
        (b'{"prompt":"x","suffix":"y","files":[{"path":"a.py","content":"x"}]}', "files"),
        (b'{"prompt":"x","stream_options":7}', "stream_options"),
    ],
    ids=lambda value: repr(value[:48]) if isinstance(value, bytes) else str(value),
)  # fmt: skip
def test_hostile_completions(client: httpx.Client, body: bytes, param: str | None) -> None:
    error = error_of(client.post("/v1/completions", content=body), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_an_error_lists_what_may_stand_there(client: httpx.Client) -> None:
    body = {"prompt": "x", "suffix": "y", "fim_order": "mps"}
    assert error_of(client.post("/v1/completions", json=body), 400)["message"] == "fim_order: it must be psm or spm"
    talk = {"messages": [{"role": "user", "content": "x"}], "reasoning_format": "both"}
    error = error_of(client.post("/v1/chat/completions", json=talk), 400)
    assert error["message"] == "reasoning_format: it must be none or auto or deepseek"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 20_000}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 3_000_000}]}, None),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": -1}, "max_completion_tokens"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_hostile_chats(client: httpx.Client, body: dict[str, Any], param: str | None) -> None:
    error = error_of(client.post("/v1/chat/completions", json=body), 400)
    assert error["param"] in (param, "prompt")


def test_strange_texts_are_text(client: httpx.Client) -> None:
    for text in ("\0", "\ufdd0", "\U0010ffff", "<|im_end|>", "\ufeff", " " * 1000):
        assert client.post("/v1/completions", json={"prompt": text}).status_code == 200
        assert (
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]}).status_code
            == 200
        )


def test_compressed_bodies_are_refused(client: httpx.Client) -> None:
    response = client.post("/v1/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert "compressed" in error_of(response, 400)["message"]
    for plain in ("identity", "Identity", ""):
        assert client.post("/v1/completions", content=b"{}", headers={"content-encoding": plain}).status_code == 200


def test_context_length_errors_name_the_limit(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": "x" * 5000}), 400)
    assert error["code"] == "context_length_exceeded" and "4096" in error["message"]


# ---- size, keys, names


@pytest.fixture(scope="module")
def locked(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Iterator[Running]:
    """A server with a key, small bodies, two names, and no patience for others."""
    engine = FakeEngine(script=scripted([*tokenizer.encode("ok"), EOS]), stop_sets={"eos": frozenset([EOS])})
    config = ServerConfig(
        api_key=KEY, max_body_bytes=1024, served_model_name=("first", "org/second"), unknown_model="refuse"
    )
    with serving(checkpoint, engine, config) as running:
        yield running


def test_every_route_but_the_probes_needs_the_key(locked: Running) -> None:
    with httpx.Client(base_url=locked.url) as client:
        paths = list(httpx.get(locked.url + "/openapi.json", headers={"api-key": KEY}).json()["paths"])
        assert len(paths) > 10
        for path in [*paths, "/openapi.json", "/nowhere", "/v1/models/first", "/livez/", "//livez", "/livez/x", "/"]:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
                response = client.request(method, path)
                if path.rstrip("/") in ("/livez", "/readyz"):
                    assert response.status_code in (200, 405)
                    continue
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert error_of(response, 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
        {"api-key": KEY},
        {"authorization": "Bearer undefined", "x-api-key": KEY},
    ],
)
def test_keys_in_every_place(locked: Running, headers: dict[str, str]) -> None:
    assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer {KEY}x"},
        {"x-api-key": KEY[:-1]},
        {"x-api-key": "\xe9"},
    ],
)
def test_wrong_keys(locked: Running, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    error_of(httpx.get(locked.url + "/v1/models", headers=raw), 401)


def test_the_tenant_is_the_key_and_not_its_text(locked: Running) -> None:
    response = httpx.post(locked.url + "/v1/completions", json={"prompt": "x"}, headers={"api-key": KEY})
    assert response.json()["choices"][0]["text"] == "ok"
    submit = locked.engine.submitted[-1]
    assert submit.tenant and submit.tenant != KEY and submit.cache.scope.startswith(submit.tenant)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b" ", "the body is empty; send a JSON object"),
        (b'{"prompt":"x"', "it ends too early"),
        (b'{"prompt":"\\ud83d"}', "it ends with half of an escaped surrogate pair"),
        (b'{"prompt":"\\ud83d long enough"}', "surrogate pair"),
    ],
)
def test_bodies_that_are_no_json_say_why(locked: Running, body: bytes, message: str) -> None:
    response = httpx.post(locked.url + "/v1/completions", content=body, headers={"api-key": KEY})
    assert message in error_of(response, 400)["message"]


def test_bodies_over_the_limit(locked: Running) -> None:
    headers = {"api-key": KEY}
    response = httpx.post(locked.url + "/v1/completions", json={"prompt": "x" * 2000}, headers=headers)
    assert error_of(response, 413)["code"] == "payload_too_large"

    # No length is declared: the server must stop reading by itself.
    with socket.create_connection(("127.0.0.1", locked.port)) as connection:
        connection.settimeout(10)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\napi-key: {KEY}\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + (b"258\r\n" + b"x" * 600 + b"\r\n") * 3)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_names(locked: Running) -> None:
    with httpx.Client(base_url=locked.url, headers={"api-key": KEY}) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["root"], card["aliases"]) for card in cards] == [
            ("first", "first", ["org/second"]),
            ("org/second", "first", ["first"]),
        ]
        assert client.get("/v1/models/org/second").json()["id"] == "org/second"
        answer = client.post("/v1/completions", json={"model": "org/second", "prompt": "x"}).json()
        assert answer["model"] == "org/second"
        refused = client.post("/v1/completions", json={"model": "gpt-4", "prompt": "x"})
        assert error_of(refused, 404)["code"] == "model_not_found"


# ---- a server without a key


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "gpu-box"}, 200),
        ({"host": "host.docker.internal"}, 200),
        ({"host": "evil.example.com"}, 403),
        ({"host": "localhost.evil.com:8000"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "vscode-webview://abc"}, 200),
        ({"origin": "https://evil.example.com"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "["}, 403),
        ({"origin": "http://["}, 403),
    ],
)
def test_foreign_web_pages_get_nothing_from_a_server_without_a_key(
    server: Running, headers: dict[str, str], status: int
) -> None:
    assert httpx.get(server.url + "/v1/models", headers=headers).status_code == status
    assert httpx.get(server.url + "/livez", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": None}),
        ("/completion", {"prompt": None}),
        ("/infill", {"input_prefix": None, "input_suffix": None, "prompt": None}),
    ],
)
def test_a_prompt_of_null_is_as_if_it_were_not_there(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    given, left_out = (client.post(path, json={"max_tokens": 2} | fields) for fields in (body, {}))
    assert given.status_code == left_out.status_code == 200, given.text


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


@pytest.mark.parametrize("origin", ["http://localhost:3000", "vscode-webview://abc"])
def test_local_pages_may_ask_before_they_send(server: Running, locked: Running, origin: str) -> None:
    for running, status in ((server, 200), (locked, 401)):
        path = running.url + "/v1/models"
        asked = httpx.options(path, headers=PREFLIGHT | {"origin": origin})
        assert (asked.status_code, asked.content) == (204, b"")
        assert asked.headers["access-control-allow-origin"] == origin and asked.headers["vary"] == "origin"
        assert asked.headers["access-control-allow-methods"] == "GET, POST"
        assert asked.headers["access-control-allow-headers"] == "authorization, content-type"
        answer = httpx.get(path, headers={"origin": origin})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, origin)


def test_other_pages_get_no_leave_to_read(server: Running, locked: Running) -> None:
    for origin in ("https://evil.example.com", "null", "http://["):
        for running, status in ((server, 403), (locked, 401)):
            refused = httpx.options(running.url + "/v1/models", headers=PREFLIGHT | {"origin": origin})
            assert refused.status_code == status
            assert not any(name.startswith("access-control") for name in refused.headers)
    rebound = httpx.options(
        server.url + "/v1/models", headers=PREFLIGHT | {"origin": "http://localhost", "host": "evil.example.com"}
    )
    assert rebound.status_code == 403 and "access-control-allow-origin" not in rebound.headers
    assert httpx.options(server.url + "/v1/models").status_code == 405
    assert "access-control-allow-origin" not in httpx.get(server.url + "/v1/models").headers
