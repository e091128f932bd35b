"""What went wrong in other servers, tried on this one: one test a class, named by its CVEs, over real sockets.

Classes that are tested elsewhere are in SECURITY.md's table beside these; test_page.py holds that table to the tree.
"""

from __future__ import annotations

import gzip
import hmac
import io
import json
import pickle
import re
import socket
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from tabstop import LLM, SamplingParams, keys
from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.door import Door
from tabstop.engine.fake import FakeEngine, scripted
from tabstop.keys import Key, KeyRing, digest_of
from tabstop.text import load_text
from tests.api.serving import EOS, Running, serving, text_checkpoint
from tests.tiny import tiny_llama

KEY = "sk-tabstop-key"
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


def make_engine() -> FakeEngine:
    return FakeEngine(script=scripted([ord("o"), ord("k"), EOS]), stop_sets={"eos": frozenset([EOS])})


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint) -> Iterator[Running]:
    """Without a key."""
    with serving(checkpoint, make_engine()) as running:
        yield running


@pytest.fixture(scope="module")
def locked(checkpoint: Checkpoint) -> Iterator[Running]:
    with serving(checkpoint, make_engine(), ServerConfig(api_key=KEY)) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    """What it asked for is over when the test is, and the server answers still."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
        assert client.post("/v1/completions", json={"prompt": "x"}).json()["choices"][0]["text"] == "ok"
    server.assert_idle()


def chat(client: httpx.Client, content: Any, **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **more})


def raw(running: Running, data: bytes) -> bytes:
    """Everything that comes back until the server closes, or has nothing more to say."""
    with socket.create_connection(("127.0.0.1", running.port), 10) as connection:
        connection.sendall(data)
        connection.settimeout(1.0)
        received = b""
        try:
            while piece := connection.recv(1 << 16):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return received


# ---- foreign code


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_cve_2025_32444_47277_10164_2024_50050_pickles_on_sockets_are_dropped(tmp_path: Path) -> None:
    """vLLM, SGLang, Meta llama and others called recv_pyobj on sockets that anybody could reach."""
    mark = tmp_path / "run"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # the bomb is one
    mark.unlink()
    address, context = f"ipc://{tmp_path}/engine.sock", zmq.Context()
    with Door(address) as door, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.IDENTITY, b"1")
        peer.connect(address)
        for frames in ([bomb], [bomb, bomb], [b""], [b"\x80" * 1000]):
            peer.send_multipart(frames)
        while door.num_bad_frames < 4:
            door.wait(10)
            assert list(door.receive()) == []
        assert not mark.exists()
    context.term()


def test_cve_2026_22807_2025_66448_code_beside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """auto_map was followed although trust_remote_code was off."""
    folder = tiny_llama(tmp_path / "model")
    mark = tmp_path / "run"
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}
    for name, more in (
        ("config.json", {"auto_map": auto_map, "trust_remote_code": True}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}),
    ):
        content = json.loads((folder / name).read_text()) | more
        (folder / name).write_text(json.dumps(content))
    assert load_text(open_checkpoint(str(folder))).tokenizer.encode("def")
    llm = LLM(str(folder), num_kv_blocks=16, max_model_len=64, dtype="float32", attention="reference")
    assert len(llm.generate(["x"], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids) == 2
    llm.close()
    assert not mark.exists()


def test_cve_2026_115911_2025_61620_62426_templates_come_from_no_client(client: httpx.Client) -> None:
    """Neither as a parameter nor within a message. The checkpoint's own is cut by time: tests/text/test_sandbox.py."""
    bomb = "{% for i in range(10**9) %}x{% endfor %}{{ 7 * 7 }}{{ cycler.__init__.__globals__ }}"
    for parameter in ("chat_template", "chat_template_kwargs"):
        refused = chat(client, "x", **{parameter: bomb if parameter == "chat_template" else {"messages": bomb}})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == parameter
    assert chat(client, bomb).status_code == 200
    shown = client.post("/apply-template", json={"messages": [{"role": "user", "content": bomb}]}).json()["prompt"]
    assert bomb in shown and "49" not in shown


def test_cve_2025_62164_2026_56340_73557_embeddings_from_clients_are_refused(client: httpx.Client) -> None:
    """Tensors in a request were read with torch.load, then checked too late."""
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": []})):
        for value in ("gASV", ["gASV"], {"data": "gASV"}):
            refused = client.post(path, json=body | {"prompt_embeds": value})
            assert refused.status_code == 400
    assert client.post("/v1/completions", json={"prompt": "x", "prompt_embeds": "gASV"}).json()["error"]["param"] == (
        "prompt_embeds"
    )


# ---- the network


@pytest.fixture
def honeypot() -> Iterator[socket.socket]:
    """Listens; whoever connects has fetched something."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_cve_2025_6242_2026_24779_0599_nothing_is_fetched(client: httpx.Client, honeypot: socket.socket) -> None:
    """Servers fetched images that requests named, also from the middle of a text."""
    url = f"http://127.0.0.1:{honeypot.getsockname()[1]}/x.png"
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_data": url}},
    ):
        assert chat(client, [part]).status_code == 400
    for text in (f"![]({url})", f"<img src='{url}'>", url, f"file://{url}"):
        assert (
            chat(client, text).status_code == client.post("/v1/completions", json={"prompt": text}).status_code == 200
        )
    schema = {"$ref": url}
    assert client.post("/v1/completions", json={"prompt": "x", "guided_json": schema}).status_code in (200, 400)


def test_cve_2026_27482_no_method_is_forgotten(server: Running, locked: Running) -> None:
    """A guard against web pages listed POST and PUT and forgot DELETE; another one looked at some paths only."""
    for path in (
        "/v1/models",
        "/v1/completions",
        "/nowhere",
        "/invocations",
        "/metrics",
        "/",
        "*",
        "//livez/../metrics",
    ):
        for method in METHODS:
            for running, status, headers in (
                (server, 403, {"origin": "https://evil.example"}),
                (server, 403, {"host": "evil.example"}),
                (locked, 401, {}),
                (locked, 401, {"authorization": "Bearer "}),
            ):
                head = {"host": "localhost", "content-length": "0", "connection": "close"} | headers
                lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
                answer = raw(running, f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode())
                assert re.match(rb"HTTP/1.1 (%d|400) " % status, answer), (method, path, headers, answer[:80])


def test_websockets_are_no_way_in(locked: Running) -> None:
    upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: " + "x" * 24
    for path in ("/v1/realtime", "/v1/completions", "/metrics", "/livez"):
        answer = raw(locked, f"GET {path} HTTP/1.1\r\nhost: localhost\r\n{upgrade}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200 " if path == "/livez" else b"HTTP/1.1 401 ")
        assert b"101 Switching" not in answer


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: %d\r\ntransfer-encoding: chunked",
        b"transfer-encoding: chunked\r\ncontent-length: %d",
        b"content-length: 5\r\ncontent-length: %d",
        b"content-length: %d, 5",
        b"content-length: +%d",
        b"content-length : %d",
        b"content-length: -%d",
        b"content-length: 0x%x",
        b"transfer-encoding: xchunked\r\nx: %d",
        b"transfer-encoding: chunked, identity\r\nx: %d",
        b"transfer-encoding : chunked\r\nx: %d",
        b"x: y\r\n continued\r\ncontent-length: %d\r\ntransfer-encoding: chunked",
        b"x: y\ncontent-length: %d\r\ntransfer-encoding: chunked",
        b"x: a\x00b%d",
    ],
)
def test_requests_are_not_smuggled(locked: Running, head: bytes) -> None:
    """What a proxy in front may read in another way is refused, and the connection closed."""
    body = b"0\r\n\r\n" + SMUGGLED
    request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\napi-key: %s\r\n" % KEY.encode()
    answer = raw(locked, request + head % len(body) + b"\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 400 ") and len(re.findall(rb"HTTP/1.1 \d", answer)) == 1, answer
    assert b"connection: close" in answer


def test_a_second_request_of_a_connection_needs_its_own_key(locked: Running) -> None:
    first = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\napi-key: %s\r\n\r\n" % KEY.encode()
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", raw(locked, first + SMUGGLED + first))
    assert statuses == [b"200", b"401", b"200"]


# ---- keys


def test_cve_2025_59425_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same work for a right key, a nearly right one and one that has nothing to do with it."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return compare(first, second)

    monkeypatch.setattr(keys.hmac, "compare_digest", counted)
    ring = KeyRing([Key(name, digest_of(KEY + name).hex()) for name in ("a", "b", "c")])
    for guess, is_right in (
        (KEY + "a", True),
        (KEY + "c", True),
        (KEY, False),
        ("x", False),
        ("", False),
        ("é", False),
    ):
        compared.clear()
        assert (ring.find([guess]) is not None) is is_right
        assert compared == [(32, 32)]


def test_keys_are_case_sensitive_and_whole(locked: Running) -> None:
    """TGI compared keys in small letters."""
    for guess in (KEY.upper(), KEY.title(), KEY[:-1], KEY + "x", f"{KEY},{KEY}", f'"{KEY}"', "*", "null", "undefined"):
        assert httpx.get(locked.url + "/v1/models", headers={"api-key": guess}).status_code == 401
    assert httpx.get(locked.url + "/v1/models", headers={"api-key": KEY}).status_code == 200


# ---- numbers, names and sizes


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31, 2**63, -(2**63) - 1, 1e308, -0.5, "1", [1], None, True])
def test_cve_2026_21869_2024_42477_numbers_from_clients_are_bounded(client: httpx.Client, value: Any) -> None:
    """A negative n_discard wrote before a buffer; a tp_size and an n came from the client unbounded."""
    names = "n_discard n_keep n_predict n_indent n_probs n_cmpl id_slot repeat_last_n t_max_predict_ms tp_size n_ctx"
    names += " n best_of logprobs top_logprobs max_tokens min_tokens seed deadline_ms truncate_prompt_tokens n_batch"
    for name in names.split():
        for path in ("/completion", "/infill", "/v1/completions"):
            answer = client.post(path, json={"prompt": "x", "max_tokens": 2, name: value})
            assert answer.status_code in (200, 400), (name, value, answer.text)


NAMES = ["__proto__", "constructor", "__class__", "__dict__", "__init__", "prototype", "toString", "hasOwnProperty"]
PATHS = [
    "../../../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "/etc/passwd",
    "C:\\windows\\win.ini",
    "file:///etc/passwd",
]
PATHS += [
    "sha256:../../../etc/passwd",
    "tiny\x00.json",
    "~root/.ssh/id_rsa",
    "$HOME",
    "`id`",
    "%(id)s",
    "{0.__class__}",
]


@pytest.mark.parametrize("name", [*NAMES, *PATHS])
def test_cve_2024_37032_45436_names_are_looked_up_and_lead_nowhere(client: httpx.Client, name: str) -> None:
    """Digests and model names became paths; names of prototypes became objects."""
    named = client.post("/v1/completions", json={"prompt": "x", "model": name})
    assert named.status_code == 200 and named.json()["model"] == "tiny"
    answer = client.get("/v1/models/" + name.replace("%", "%25").replace("\x00", "%00"))
    assert answer.status_code == 404 and "root:" not in answer.text
    for path in (f"/{name}", f"/v1/{name}"):
        answer = raw_path(client, path)
        assert answer in (400, 403, 404), path
    body = {"prompt": "x", name: {"a": 1}, "cache": {name: 1}, "stream_options": {name: {}}}
    assert client.post("/v1/completions", json=body).status_code == 200


def raw_path(client: httpx.Client, path: str) -> int:
    """Of a GET whose path no client library tidied."""
    plain = path.encode("ascii", "ignore").replace(b"\x00", b"%00").replace(b" ", b"%20")
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 10) as connection:
        connection.sendall(b"GET " + plain + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return int(connection.recv(1 << 16).split()[1])


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil", b"0" * 10_000_000)
    return file.getvalue()


@pytest.mark.parametrize(
    ("encoding", "bomb"),
    [
        ("gzip", gzip.compress(b"0" * 10_000_000)),
        ("deflate", zlib.compress(b"0" * 10_000_000)),
        ("br", b"\x5b\xff\xff\x00\x80" * 100),
        ("zstd", b"\x28\xb5\x2f\xfd" * 100),
        ("gzip, gzip", gzip.compress(gzip.compress(b"0" * 10_000_000))),
        ("", zipped()),
    ],
)
def test_bombs_are_not_unpacked(client: httpx.Client, encoding: str, bomb: bytes) -> None:
    headers = {"content-type": "application/json"} | ({"content-encoding": encoding} if encoding else {})
    assert client.post("/v1/completions", content=bomb, headers=headers).status_code == 400


def test_forms_are_not_parsed(client: httpx.Client) -> None:
    parts = "".join(f'--b\r\ncontent-disposition: form-data; name="f{i}"\r\n\r\nx\r\n' for i in range(10_000)) + "--b--"
    for kind in ("multipart/form-data; boundary=b", "application/x-www-form-urlencoded", "application/json"):
        assert client.post("/v1/completions", content=parts, headers={"content-type": kind}).status_code == 400


def test_cve_2026_22778_messages_hold_no_addresses_paths_or_traces(
    client: httpx.Client, checkpoint: Checkpoint
) -> None:
    """A heap address in an error message was half of a remote execution."""
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"prompt": 1}',
        b'{"prompt": {}}',
        b'{"prompt": "x", "n": "\\ud800"}',
    ]
    bodies += [json.dumps({"prompt": "x", "stop": value}).encode() for value in ({}, [[]], [1], "")]
    bodies += [json.dumps({"prompt": "x", "guided_grammar": "start: <"}).encode(), b'{"prompt":[[]]}']
    for path in client.get("/openapi.json").json()["paths"]:
        for body in bodies:
            text = client.post(path, content=body).text
            assert not re.search(r"0x[0-9a-f]{5,}|Traceback|object at|\.py\b|site-packages|/tmp/|/home/|/usr/", text), (
                text
            )
            assert str(checkpoint.folder) not in text


# ---- python -O

OPTIMIZED = """
import asyncio, httpx, sys
from pathlib import Path
from tabstop.api.app import build_app
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tabstop.service import make_service

async def main():
    config = ServerConfig(api_key="k", max_body_bytes=1024)
    engine = FakeEngine(stop_sets={"eos": frozenset()})
    app = build_app(make_service(Checkpoint("tiny", folder=Path(sys.argv[1])), [engine], config), config)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        async def status(key="k", **body):
            return (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | body, headers={"api-key": key})).status_code
        print(await status(), await status(key="x"), await status(n=10**6), await status(prompt="x" * 5000),
              await status(prompt=[2**31]), await status(logit_bias={"999999": 1}), await status(max_tokens=10**6))

assert False, "asserts are on"
asyncio.run(main())
"""  # noqa: E501


def test_cve_2026_41523_checks_hold_without_asserts(checkpoint: Checkpoint) -> None:
    """A security check was written as an assert, which python -O leaves out."""
    command = [sys.executable, "-O", "-c", OPTIMIZED, str(checkpoint.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["200", "401", "400", "413", "400", "400", "400"], done.stderr
