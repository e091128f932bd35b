"""`tabstop serve` as a user starts it, over a tiny real checkpoint, asked by real clients over loopback sockets."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.tiny import tiny_llama

PATIENCE = 60.0  # seconds; only a hang reaches it
NUM_CANCELLED = 1000
AT_ONCE = 50
LONG = 400  # tokens


class RealServer:
    """A server process tree with two front ends, and what it logged."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tabstop", "serve", str(folder), "--port", "0", "--num-front-ends", "2"]
        command += ["--max-num-seqs", "16", "--num-kv-blocks", "512", "--num-threads", "1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.log: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(pipe,)) for pipe in (self.process.stdout, self.process.stderr)
        ]
        for thread in self._threads:
            thread.start()
        self.url = self._wait_for_url()

    def _read(self, pipe) -> None:
        with pipe:
            self.log += pipe

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"http://127\.0\.0\.1:\d+", "".join(self.log))
            if found and is_ready(found[0]):
                return found[0]
            time.sleep(0.05)
        raise AssertionError("the server did not become ready:\n" + "".join(self.log))

    def child(self, module: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if any(module in word for word in child.cmdline())]

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def total(self, name: str) -> float:
        return sum(value for key, value in self.metrics().items() if key.split("{")[0] == name)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        for thread in self._threads:
            thread.join()
        return code


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny-coder")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[RealServer]:
    server = RealServer(folder)
    yield server
    assert server.stop() == 0, "".join(server.log)
    assert not psutil.pid_exists(server.process.pid)


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


GREEDY = {"model": "tiny-coder", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def test_streamed_text_equals_whole_text(client):
    whole = client.completions.create(prompt="def f(x):", **GREEDY)
    chunks = list(
        client.completions.create(prompt="def f(x):", stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"


def test_chat_streams_and_names_its_role_first(client):
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(messages=messages, **GREEDY)
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


async def test_many_clients_at_once_get_what_one_gets(server, client):
    alone = [client.completions.create(prompt=f"x{n} = ", **GREEDY).choices[0].text for n in range(8)]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as asynchronous:
        answers = await asyncio.gather(
            *(asynchronous.completions.create(prompt=f"x{n % 8} = ", **GREEDY) for n in range(32))
        )
    assert [answer.choices[0].text for answer in answers] == alone * 4


def test_the_same_prompt_again_computes_at_most_a_block(client):
    prompt = list(range(250)) + [n * 7 % 250 for n in range(200)]
    for expected in (0, len(prompt) - 16):
        usage = client.completions.create(prompt=prompt, **GREEDY | {"max_tokens": 2}).usage
        assert usage.prompt_tokens_details.cached_tokens >= expected
    usage = client.completions.create(prompt=[*prompt, 5], **GREEDY | {"max_tokens": 2}).usage
    assert usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens <= 3


def test_draws_and_their_reports_cross_the_processes(client):
    extra = {"repetition_penalty": 1.5, "bad_words": ["pt"], "min_p": 0.1, "allowed_token_ids": list(range(40, 90))}
    settings = GREEDY | {"extra_body": GREEDY["extra_body"] | extra}
    (choice,) = client.completions.create(prompt="x", logprobs=2, **settings).choices
    assert len(choice.logprobs.tokens) == GREEDY["max_tokens"] and "pt" not in choice.text
    assert all(entry < 0 for entry in choice.logprobs.token_logprobs)


WHOLE = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
GRAMMARS = {
    "guided_json": (WHOLE, lambda text: set(json.loads(text)) == {"ok", "n"}),
    "guided_regex": ("[a-c]{3}", lambda text: re.fullmatch("[a-c]{3}", text)),
    "guided_choice": (["def", "déf"], lambda text: text in ("def", "déf")),
    "guided_grammar": ('start: "x" /[0-9]{2}/', lambda text: re.fullmatch("x[0-9]{2}", text)),
    "grammar": ('root ::= "x" [0-9] [0-9]', lambda text: re.fullmatch("x[0-9]{2}", text)),
    "structured_outputs": ({"json": json.dumps(WHOLE)}, lambda text: set(json.loads(text)) == {"ok", "n"}),
    "response_format": (
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": WHOLE}},
        lambda text: set(json.loads(text)) == {"ok", "n"},
    ),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_answers_follow_every_kind_of_grammar(client, name):
    """Whole and streamed, as completion and as chat, in several samples; complete texts end by themselves."""
    value, is_right = GRAMMARS[name]
    settings = {"model": "tiny-coder", "temperature": 1, "seed": 5, "max_tokens": 200}
    settings["extra_body"] = {name: value, "ignore_eos": name == "guided_regex"}
    whole = client.completions.create(prompt="x = ", n=3, **settings)
    assert all(is_right(choice.text) and choice.finish_reason == "stop" for choice in whole.choices)
    messages = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(messages=messages, **settings).choices[0]
    assert is_right(answer.message.content) and answer.finish_reason == "stop"
    chunks = client.chat.completions.create(messages=messages, stream=True, **settings)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"guided_regex": "("}, "unclosed group"),
        ({"guided_json": {"not": {}}}, "cannot be followed"),
        ({"guided_regex": "a" * 70_000}, "--max-grammar-bytes"),
        ({"guided_json": '{"items":' * 70 + "{}" + "}" * 70}, "--max-grammar-depth"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "only one of them"),
        ({"guided_choice": ["a"], "allowed_token_ids": [5]}, "allow no further token"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "not supported"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_a_400(client, stream, extra, message):
    """Before a stream begins, naming the parameter."""
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(prompt="x", stream=stream, extra_body=extra, model="tiny-coder")
    assert caught.value.param == next(iter(extra))


def test_hostile_grammars_hold_nobody_up(client, server):
    """They end, by themselves or by an error, while others are answered."""
    hostile = {
        "regex": "((a{100}){100}){100}",
        "regex ": "(a{1,1000}){1,1000}",
        "regex  ": "(.*a.{30}|.*b.{25})c",
        "grammar": 'start: s\ns: s s s | s s | /[a-z]/ | ""',
        "grammar ": 'start: x{1000000}\nx: "a"',
        "json": {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1200)}},
        "json ": {"allOf": [{"anyOf": [{"properties": {f"{n}_{m}": {}}} for m in range(10)]} for n in range(8)]},
    }
    bodies = [{"structured_outputs": {name.strip(): value}, "ignore_eos": True} for name, value in hostile.items()]

    def ask(body):
        json_body = {"prompt": "x", "max_tokens": 60, "temperature": 1, "seed": 1} | body
        return httpx.post(f"{server.url}/v1/completions", json=json_body, timeout=PATIENCE)

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [pool.submit(ask, body) for body in bodies]
        for _ in range(5):
            assert client.completions.create(prompt="y", **GREEDY).usage.completion_tokens == 24
        assert {answer.result().status_code for answer in answers} <= {200, 400}
    until(lambda: is_empty(server), "the grammars to be gone")


def test_errors_have_the_clients_classes(client):
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(prompt="x", logit_bias={"99999": 2}, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(prompt="x", **GREEDY | {"max_tokens": 10_000})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


async def cancel_one(client: httpx.AsyncClient, gate: asyncio.Semaphore, rng: random.Random) -> None:
    """Opens a stream and leaves: before it is answered, at its first bytes, or after some tokens."""
    body = {"prompt": "a" * rng.randrange(1, 60), "max_tokens": LONG, "ignore_eos": True, "n": rng.choice([1, 1, 1, 3])}
    num_lines = rng.choice([None, 0, 1, 5, 20])
    async with gate:
        try:
            async with asyncio.timeout(rng.uniform(0, 0.02) if num_lines is None else PATIENCE):
                async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                    lines = response.aiter_lines()
                    for _ in range(num_lines or 0):
                        await anext(lines, "")  # a busy machine sends many tokens in one event
        except (TimeoutError, httpx.TransportError):
            assert num_lines is None


async def test_a_thousand_cancelled_streams_leave_nothing(server):
    """No block, queue entry or text state stays; the processes' memory stays where a first storm left it."""
    rng, gate, rss = random.Random(1), asyncio.Semaphore(AT_ONCE), []
    parent = psutil.Process(server.process.pid)
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as client:
        for num_streams in (NUM_CANCELLED // 2, NUM_CANCELLED):
            await asyncio.gather(*(cancel_one(client, gate, rng) for _ in range(num_streams)))
            await asyncio.to_thread(until, lambda: is_empty(server), "blocks, queues and text states to be free")
            rss.append(sum(process.memory_info().rss for process in parent.children()))
    assert rss[1] - rss[0] < 20 * 2**20, rss
    assert server.total("tabstop_aborts_total") > NUM_CANCELLED // 2


def is_empty(server: RealServer) -> bool:
    names = ("text_states", "num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
    return not any(server.total(f"tabstop_{name}") for name in names)


def test_a_dead_front_end_frees_its_blocks_and_is_replaced(server):
    body = {"prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": True}
    streams = [httpx.Client(base_url=server.url, timeout=PATIENCE) for _ in range(8)]
    contexts = [stream.stream("POST", "/v1/completions", json=body) for stream in streams]
    responses = [context.__enter__() for context in contexts]
    before = {child.pid for child in server.child("front_end")}
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    for response in responses:
        with pytest.raises(httpx.TransportError):
            response.read()
    for stream in streams:
        stream.close()
    until(lambda: is_ready(server.url), "new front ends")
    until(lambda: is_empty(server), "the blocks of the dead")
    assert not before & {child.pid for child in server.child("front_end")} and len(server.child("front_end")) == 2


def test_a_dead_engine_ends_every_stream_and_the_server(folder):
    server = RealServer(folder)
    body = {"prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE) as response:
        lines = response.iter_lines()
        next(lines)
        [engine] = server.child("engine.process")
        engine.kill()
        rest = [line for line in lines if line]
    assert "engine_dead" in rest[-1] or "engine_dead" in rest[-2]
    assert server.wait() not in (0, 2)
