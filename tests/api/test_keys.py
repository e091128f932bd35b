"""Keys over a socket: scopes by route, tenants' caches, ceilings and what their refusals say."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tabstop.api.ceilings import MINUTE, Counts
from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.fake import FakeEngine
from tabstop.errors import RateLimitError
from tabstop.keys import Key, digest_of
from tabstop.types import Priority
from tests.api.serving import Running, serving

PAGE = (Path(__file__).parents[2] / "docs/operations.md").read_text(encoding="utf-8")

LONG = "def f(x):\n" * 20


def key_of(name: str, **fields: object) -> Key:
    """A key whose text is its name."""
    return Key(name, digest_of(name).hex(), **fields)


KEYS = [
    key_of("user"),
    key_of("boss", scopes=("infer", "admin")),
    key_of("watch", scopes=("admin",)),
    key_of("red", tenant="one"),
    key_of("blue", tenant="one"),
    key_of("other", tenant="two"),
    key_of("late", priority_class="background"),
    key_of("two-at-once", max_concurrent=2),
    key_of("three-a-minute", requests_per_minute=3),
    key_of("hundred-tokens", tokens_per_minute=100),
]


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint) -> Iterator[Running]:
    """Keys from a file beside a single one; tokens come slowly."""
    config = ServerConfig(key_file="keys", api_key="single", max_open_requests=8)
    engine = FakeEngine(stop_sets={"eos": frozenset()}, delay=0.002)
    with serving(checkpoint, engine, config, KEYS) as running:
        yield running


@pytest.fixture
def as_user(server: Running) -> Iterator[httpx.Client]:
    """Sends no key by itself."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
    server.assert_idle()


def complete(client: httpx.Client, key: str, **body: object) -> httpx.Response:
    request = {"prompt": LONG, "max_tokens": 2, "temperature": 0} | body
    return client.post("/v1/completions", json=request, headers={"x-api-key": key})


def cached_tokens(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


# ---- scopes


def route_table() -> dict[str, set[str]]:
    """docs/operations.md: scope → paths without /v1."""
    rows = re.findall(r"^\| (infer|admin|any key|no key) \| (`/.*) \|$", PAGE, re.MULTILINE)
    return {scope: set(re.findall(r"`([^`]+)`", paths)) for scope, paths in rows}


def test_every_route_has_the_scope_that_the_table_says(server: Running, as_user: httpx.Client) -> None:
    paths = as_user.get("/openapi.json", headers={"api-key": "user"}).json()["paths"]
    table = route_table()
    assert set(table) == {"infer", "admin", "any key", "no key"}
    listed = {path.removeprefix("/v1") for path in paths} | {"/openapi.json"}
    assert set().union(*table.values()) == listed
    for path in [*paths, "/openapi.json"]:
        (scope,) = (scope for scope, named in table.items() if path.removeprefix("/v1") in named)
        method = "POST" if "post" in paths.get(path, {}) else "GET"
        place = path.replace("{model}", "tiny")
        statuses = {
            key: as_user.request(method, place, content=b"[]", headers={"api-key": key} if key else {}).status_code
            for key in ("", "wrong", "user", "watch", "boss", "single")
        }
        passed = {key for key, status in statuses.items() if status not in (401, 403)}
        expected = {
            "infer": {"user", "boss", "single"},
            "admin": {"watch", "boss", "single"},
            "any key": {"user", "watch", "boss", "single"},
            "no key": {"", "wrong", "user", "watch", "boss", "single"},
        }[scope]
        assert passed == expected, (path, statuses)
        assert statuses[""] == statuses["wrong"] == (401 if scope != "no key" else 200)
    refused = as_user.get("/metrics", headers={"api-key": "user"})
    assert refused.status_code == 403 and "scope admin" in refused.json()["error"]["message"]


def test_an_empty_ring_lets_nobody_in(checkpoint: Checkpoint) -> None:
    with serving(checkpoint, FakeEngine(stop_sets={"eos": frozenset()}), ServerConfig(key_file="keys")) as running:
        assert httpx.get(running.url + "/v1/models").status_code == 401
        assert httpx.get(running.url + "/v1/models", headers={"api-key": "user"}).status_code == 401
        running.call(lambda: running.state.keys.replace(KEYS))
        assert httpx.get(running.url + "/v1/models", headers={"api-key": "user"}).status_code == 200
        running.call(lambda: running.state.keys.replace(KEYS[1:]))
        assert httpx.get(running.url + "/v1/models", headers={"api-key": "user"}).status_code == 401


# ---- tenants, classes


def test_no_tenant_finds_another_ones_blocks(as_user: httpx.Client) -> None:
    assert cached_tokens(complete(as_user, "red")) == 0
    assert cached_tokens(complete(as_user, "red")) > 0
    assert cached_tokens(complete(as_user, "blue")) > 0  # the same tenant
    for stranger in ("other", "user", "single", "boss"):
        assert cached_tokens(complete(as_user, stranger)) == 0, stranger
    salted = {"cache_salt": "one", "user": "red", "session": "one"}
    assert cached_tokens(complete(as_user, "late", **salted)) == 0


def test_no_request_gets_a_better_class_than_its_key(server: Running, as_user: httpx.Client) -> None:
    for key, asked, given in [
        ("late", "interactive", Priority.BACKGROUND),
        ("late", None, Priority.BACKGROUND),
        ("user", "interactive", Priority.INTERACTIVE),
        ("user", None, Priority.NORMAL),
        ("user", "background", Priority.BACKGROUND),
    ]:
        complete(as_user, key, **({"priority": asked} if asked else {}))
        assert server.engine.submitted[-1].priority is given
    as_user.post("/v1/completions", json={"prompt": "x"}, headers={"api-key": "late", "x-priority": "interactive"})
    assert server.engine.submitted[-1].priority is Priority.BACKGROUND


# ---- ceilings


def refusal(response: httpx.Response) -> str:
    """The message of a refusal by a ceiling."""
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1
    return error["message"]


def test_requests_a_minute(as_user: httpx.Client) -> None:
    answers = [complete(as_user, "three-a-minute") for _ in range(3)]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0"]
    refused = complete(as_user, "three-a-minute")
    assert "3 requests a minute" in refusal(refused) and 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-limit-requests"] == "3" and refused.headers["x-ratelimit-reset-requests"]
    tokenized = as_user.post("/tokenize", json={"prompt": "x"}, headers={"api-key": "three-a-minute"})
    assert tokenized.status_code == 429  # every POST counts
    assert as_user.get("/v1/models", headers={"api-key": "three-a-minute"}).status_code == 200
    assert "x-ratelimit-limit-requests" not in complete(as_user, "user").headers


def test_tokens_a_minute_are_spent_as_they_come(server: Running, as_user: httpx.Client) -> None:
    num_prompt = complete(as_user, "user", prompt="x" * 40).json()["usage"]["prompt_tokens"]
    first = complete(as_user, "hundred-tokens", prompt="x" * 40, max_tokens=30)
    assert first.status_code == 200 and first.headers["x-ratelimit-remaining-tokens"] != "100"
    second = complete(as_user, "hundred-tokens", prompt="x" * 40, max_tokens=60)  # into debt
    assert second.status_code == 200 and 2 * num_prompt + 90 > 100
    refused = complete(as_user, "hundred-tokens", prompt="x", max_tokens=1)
    assert "100 tokens a minute" in refusal(refused) and refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert int(refused.headers["retry-after"]) > 30  # 170 tokens are spent: the debt of 70 takes 42 s


def test_concurrent_requests(server: Running, as_user: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 4000, "stream": True}
    headers = {"api-key": "two-at-once"}
    with (
        as_user.stream("POST", "/v1/completions", json=body, headers=headers),
        as_user.stream("POST", "/v1/completions", json=body, headers=headers),
    ):
        assert "2 requests open" in refusal(complete(as_user, "two-at-once"))
        assert complete(as_user, "user").status_code == 200
    server.assert_idle()
    server.wait_until(lambda: complete(as_user, "two-at-once").status_code == 200)
    bad = as_user.post("/v1/completions", content=b"{", headers=headers)
    assert bad.status_code == 400
    assert complete(as_user, "two-at-once").status_code == 200  # what failed is not open


def test_a_front_end_has_so_many_requests_open(server: Running) -> None:
    """Slow bodies count, too: nothing is read for those who come later."""
    body = {"prompt": "x", "max_tokens": 4000, "stream": True}
    barrier, done = threading.Barrier(9), threading.Event()

    def hold() -> None:
        with httpx.stream("POST", server.url + "/v1/completions", json=body, headers={"api-key": "boss"}) as response:
            assert response.status_code == 200
            barrier.wait(30)
            done.wait(30)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait(30)
    with httpx.Client(base_url=server.url) as client:
        refused = complete(client, "user")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] and client.get("/readyz").status_code == 200
        done.set()
        for thread in threads:
            thread.join(30)
        server.wait_until(lambda: complete(client, "user").status_code == 200)
    server.assert_idle()


# ---- counting


def test_an_allowance_is_a_minutes_worth_and_comes_back() -> None:
    counts = Counts().of(key_of("k", requests_per_minute=60))
    for _ in range(60):
        counts.enter(1000.0)
    with pytest.raises(RateLimitError) as error:
        counts.enter(1000.0)
    assert error.value.retry_after == 1
    counts.enter(1001.0)
    with pytest.raises(RateLimitError):
        counts.enter(1001.5)
    for _ in range(60):
        counts.enter(1001.0 + MINUTE)
    with pytest.raises(RateLimitError):
        counts.enter(1001.0 + MINUTE)


def test_less_than_one_a_minute_lets_one_pass() -> None:
    counts = Counts().of(key_of("k", requests_per_minute=0.5))
    counts.enter(1000.0)
    with pytest.raises(RateLimitError) as error:
        counts.enter(1060.0)
    assert error.value.retry_after == 60
    counts.enter(1120.0)


def test_front_ends_count_together_and_a_successor_begins_with_none(tmp_path: Path) -> None:
    key = key_of("k", requests_per_minute=10, max_concurrent=4)
    first, second = (Counts(tmp_path, place, 2).of(key) for place in (0, 1))
    for counts in (first, second, first, second):
        counts.enter(1000.0)
    with pytest.raises(RateLimitError, match="4 requests open"):
        first.enter(1000.0)
    second.leave()
    first.enter(1000.0)
    successor = Counts(tmp_path, 0, 2).of(key)  # three of the first one's were open
    for _ in range(3):
        successor.enter(1000.0)
    with pytest.raises(RateLimitError, match="open"):
        successor.enter(1000.0)
    for _ in range(2):
        successor.leave()
        successor.enter(1000.0)
    successor.leave()
    with pytest.raises(RateLimitError, match="10 requests a minute"):  # the dead one's are spent all the same
        second.enter(1000.0)
