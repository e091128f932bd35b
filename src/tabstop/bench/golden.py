"""The golden server: streams whose every token and send time is known, to measure the measuring tool.

It answers in all four dialects from a script that depends only on (seed, request): which tokens, cut into which chunks,
when. It writes down when each event left and serves that at /golden/log. Its tokens are words that begin with a space,
some of them several bytes a character. It computes nothing else; it is not a fake engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = (" def", " return", " x", " =", " été", " größer", " 日本語", " λ→", " 🙂🙂", " self.value", " \\n", " (a,b)")
STYLES = ("plain", "several", "inside-token", "inside-utf8", "pings")
FAULTS = ("error-event", "cut", "garbage", "http-500", "no-end")
FORMS = {"/v1/completions": "text", "/v1/chat/completions": "chat", "/generate_stream": "tgi", "/generate": "tgi"}
MODEL = "golden"


class Behaviour(msgspec.Struct, frozen=True):
    """What the server does. Any field can be set for one request by a header: x-golden-<field>."""

    ttft: float = 0.02  # seconds
    rate: float = 200.0  # tokens a second of one stream
    slow_down: float = 1.0  # multiplies both
    jitter: float = 0.0  # standard deviation of the log of a request's speed
    style: str = "plain"  # one of STYLES, or "mixed": each request another
    fault: str = ""  # one of FAULTS
    fault_share: float = 0.0  # share of requests with the fault
    slots: int = 0  # requests served at once; the rest waits. 0: no limit
    ignore_max_tokens: bool = False
    usage: bool = True  # final usage
    running_usage: bool = True  # usage in each chunk, if the client asks
    seed: int = 0


class Step(msgspec.Struct, frozen=True):
    """One event of a script: due `at` seconds after the request began to run."""

    at: float
    text: str
    num_tokens: int  # tokens whose last character is in here
    kind: str = "text"  # text | ping | error-event | cut | garbage


class Sent(msgspec.Struct, array_like=True):
    """One event that left: monotonic seconds, tokens, characters."""

    at: float
    num_tokens: int
    num_chars: int


class Told(msgspec.Struct):
    """The truth about one request, by its x-request-id."""

    request: str
    received: float
    prompt_tokens: int
    sent: list[Sent] = []
    text: str = ""
    is_whole: bool = False
    num_before: int = 0  # requests of the same name, of earlier runs; only the last one's story is kept


def golden_tokenizer() -> Tokenizer:
    """The tokenizer of the server's words: one token a word, the space before it included."""
    vocabulary = {word: index for index, word in enumerate((*WORDS, "[UNK]"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    return tokenizer


def cut(words: list[str], style: str, rng: random.Random) -> list[tuple[str, int, int]]:
    """Words → (text, tokens finished in it, index of the last word touched), cut as `style` says."""
    if style == "several":
        chunks, position = [], 0
        while position < len(words):
            size = min(rng.randint(1, 5), len(words) - position)
            chunks.append(("".join(words[position : position + size]), size, position + size - 1))
            position += size
        return chunks
    chunks = []
    for index, word in enumerate(words):
        if style == "inside-token" and len(word) > 2:
            middle = rng.randint(1, len(word) - 1)
            chunks += [(word[:middle], 0, index), (word[middle:], 1, index)]
        elif style == "inside-utf8" and not word.isascii():
            # A byte-level token ends inside a character: the server must hold the text back and sends none.
            chunks += [("", 0, index), (word, 1, index)]
        else:
            chunks.append((word, 1, index))
    return chunks


def make_script(
    behaviour: Behaviour, identity: str, num_tokens: int, *, one_token_an_event: bool = False
) -> list[Step]:
    """The whole stream of one request."""
    rng = random.Random(f"{behaviour.seed}/{identity}")
    style = rng.choice(STYLES) if behaviour.style == "mixed" else behaviour.style
    style = "pings" if one_token_an_event else style
    fault = behaviour.fault if rng.random() < behaviour.fault_share else ""
    if fault == "no-end" or behaviour.ignore_max_tokens:
        num_tokens *= 2
    speed = behaviour.slow_down * rng.lognormvariate(0, behaviour.jitter)
    words = rng.choices(WORDS, k=num_tokens)
    steps: list[Step] = []
    for text, finished, last in cut(words, style, rng):
        at = speed * (behaviour.ttft + last / behaviour.rate)
        if style == "pings" and rng.random() < 0.3:
            steps.append(Step(at, "", 0, "ping"))
        steps.append(Step(at, text, finished))
    if fault in ("error-event", "cut", "garbage"):
        position = rng.randrange(1, len(steps)) if len(steps) > 1 else 0
        steps = [*steps[:position], Step(steps[position].at, "", 0, fault)]
    return steps


# ---------------------------------------------------------------------------------------------------- wire forms


class Wire:
    """The events of one dialect for one request."""

    def __init__(self, path: str, body: dict[str, Any], behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        options = body.get("stream_options") or {}
        self.form = FORMS.get(path, "llama")
        self.is_stream = bool(body.get("stream")) and path != "/generate"
        self.running = bool(options.get("continuous_usage_stats")) and behaviour.running_usage
        parameters = body.get("parameters") or {}
        self.max_tokens = int(body.get("max_tokens") or body.get("n_predict") or parameters.get("max_new_tokens") or 16)
        self.prompt = _prompt_of(body)
        self.prompt_tokens = len(self.prompt) if isinstance(self.prompt, list) else count_words(self.prompt)

    def text(self, text: str, num_tokens: int, total: int) -> Any:
        if self.form == "tgi":
            return {"token": {"id": 1, "text": text, "special": False}, "generated_text": None, "details": None}
        if self.form == "llama":
            return {"content": text, "tokens": [1] * num_tokens, "stop": False}
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        choice |= {"text": text} if self.form == "text" else {"delta": {"content": text}}
        chunk: dict[str, Any] = {"id": "golden", "object": "chunk", "choices": [choice]}
        if self.running:
            chunk["usage"] = {"prompt_tokens": self.prompt_tokens, "completion_tokens": total}
        return chunk

    def whole(self, text: str, total: int, cached: int) -> Any:
        """The answer in one body."""
        if self.form in ("tgi", "llama"):
            (last,) = self.end(text, total, cached)
            return last if self.form == "tgi" else last | {"content": text}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"text": text} if self.form == "text" else {"message": {"role": "assistant", "content": text}}
        answer: dict[str, Any] = {"id": "golden", "choices": [choice]}
        return answer | ({"usage": self.usage(total, cached)} if self.behaviour.usage else {})

    def usage(self, total: int, cached: int) -> dict[str, Any]:
        details = {"cached_tokens": cached}
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": total, "prompt_tokens_details": details}

    def end(self, text: str, total: int, cached: int) -> list[Any]:
        """The last events: finish reason, usage, [DONE], as this dialect orders them."""
        if self.form == "tgi":
            details = {"finish_reason": "length", "generated_tokens": total, "input_length": self.prompt_tokens}
            return [{"generated_text": text, "details": details}]
        if self.form == "llama":
            counts = {"tokens_predicted": total, "tokens_evaluated": self.prompt_tokens, "timings": {"cache_n": cached}}
            return [{"content": "", "stop": True, "stop_type": "limit", **counts}]
        last: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        last["text" if self.form == "text" else "delta"] = "" if self.form == "text" else {}
        events: list[Any] = [{"choices": [last]}]
        if self.behaviour.usage:
            events.append({"choices": [], "usage": self.usage(total, cached)})
        return [*events, b"[DONE]"]


def count_words(text: str) -> int:
    """Tokens of a text under golden_tokenizer, without building it."""
    return max(1, text.count(" ") + (not text.startswith(" ")))


def _prompt_of(body: dict[str, Any]) -> str | list[int]:
    if "messages" in body:
        return "".join(" " + str(message["content"]).strip() for message in body["messages"])
    if "input_prefix" in body:
        return str(body["input_prefix"]) + str(body.get("input_suffix", ""))
    prompt = body.get("prompt", body.get("inputs", ""))
    return prompt if isinstance(prompt, list) else str(prompt) + str(body.get("suffix") or "")


# -------------------------------------------------------------------------------------------------------- server


class GoldenServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.told: dict[str, Told] = {}
        self.seen: set[str] = set()
        self.slots = asyncio.Semaphore(behaviour.slots) if behaviour.slots else None

    def application(self) -> web.Application:
        application = web.Application(client_max_size=64 << 20)
        for path in (*FORMS, "/completion", "/infill"):
            application.router.add_post(path, self.answer)
        application.router.add_get("/v1/models", self.models)
        application.router.add_get("/golden/log", self.log)
        application.router.add_delete("/golden/log", self.forget)
        application.router.add_post("/tokenize", self.tokenize)
        return application

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = str(body.get("prompt") or body.get("content") or body.get("inputs") or "")
        return web.json_response({"tokens": [0] * count_words(text), "count": count_words(text)})

    async def log(self, request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(list(self.told.values())), content_type="application/json")

    async def forget(self, request: web.Request) -> web.Response:
        self.told.clear()
        self.seen.clear()
        return web.Response()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        received = time.monotonic()
        body = msgspec.json.decode(await request.read())
        behaviour = _with_headers(self.behaviour, request)
        if body.get("model") not in (None, "", MODEL):
            error = {"message": f"the model {body['model']!r} does not exist", "code": "model_not_found"}
            return web.json_response({"error": error}, status=404)
        wire = Wire(request.path, body, behaviour)
        identity = request.headers.get("x-request-id", str(len(self.told)))
        if behaviour.fault == "http-500" and random.Random(f"500/{identity}").random() < behaviour.fault_share:
            return web.json_response({"error": {"message": "golden fault"}}, status=500)
        before = self.told.get(identity)
        told = self.told[identity] = Told(identity, received, wire.prompt_tokens)
        told.num_before = before.num_before + 1 if before else 0
        async with self.slots or contextlib.nullcontext():
            return await (self._play(request, wire, told) if wire.is_stream else self._whole(wire, told))

    async def _whole(self, wire: Wire, told: Told) -> web.Response:
        """All tokens at the end of the script; a fault inside it is a broken or an erroneous body."""
        script = make_script(wire.behaviour, told.request, wire.max_tokens)
        async for step in _paced(script, time.monotonic()):
            if step.kind == "error-event":
                return web.json_response({"error": {"message": "golden fault"}})
            if step.kind in ("cut", "garbage"):
                return web.Response(body=b'{"choices": [{"text": ', content_type="application/json")
        told.text = "".join(step.text for step in script)
        total = sum(step.num_tokens for step in script)
        body = msgspec.json.encode(wire.whole(told.text, total, self._cached(wire)))
        told.sent.append(Sent(time.monotonic(), total, len(told.text)))
        told.is_whole = True
        return web.Response(body=body, content_type="application/json")

    def _cached(self, wire: Wire) -> int:
        """Prompt tokens seen before, all or none."""
        digest = hashlib.sha256(repr(wire.prompt).encode()).hexdigest()
        is_known = digest in self.seen
        self.seen.add(digest)
        return wire.prompt_tokens if is_known else 0

    async def _play(self, request: web.Request, wire: Wire, told: Told) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-cache"})
        await response.prepare(request)
        start, total = time.monotonic(), 0
        is_tgi = wire.form == "tgi"
        script = make_script(wire.behaviour, told.request, wire.max_tokens, one_token_an_event=is_tgi)
        async for step in _paced(script, start):
            if step.kind == "cut":
                if request.transport is not None:
                    request.transport.close()  # what was written still arrives
                return response
            if step.kind != "text":
                await response.write(_odd_bytes(step.kind))
                if step.kind == "ping":
                    continue
                return response  # a fault ends the stream
            total += step.num_tokens
            data = b"data: " + msgspec.json.encode(wire.text(step.text, step.num_tokens, total)) + b"\n\n"
            if wire.behaviour.style == "inside-utf8":
                middle = len(data) // 2
                await response.write(data[:middle])  # the network may cut anywhere, also inside a character
                data = data[middle:]
            if step.text or step.num_tokens:
                told.sent.append(Sent(time.monotonic(), step.num_tokens, len(step.text)))
            await response.write(data)
            told.text += step.text
        return await self._finish(response, wire, told, total)

    async def _finish(self, response: web.StreamResponse, wire: Wire, told: Told, total: int) -> web.StreamResponse:
        cached = self._cached(wire)
        if wire.behaviour.fault != "no-end":
            for event in wire.end(told.text, total, cached):
                data = event if isinstance(event, bytes) else msgspec.json.encode(event)
                await response.write(b"data: " + data + b"\n\n")
        told.is_whole = True
        await response.write_eof()
        return response


async def _paced(steps: list[Step], start: float) -> AsyncIterator[Step]:
    for step in steps:
        delay = start + step.at - time.monotonic()
        if delay > 0:
            await asyncio.sleep(delay)
        yield step


def _odd_bytes(kind: str) -> bytes:
    return {
        "ping": b": ping\n\n",
        "garbage": b'data: {"choices": [{"text": \n\n',
        "error-event": b'data: {"error": {"message": "golden fault", "type": "server_error"}}\n\n',
    }[kind]


def _with_headers(behaviour: Behaviour, request: web.Request) -> Behaviour:
    """The behaviour with this request's x-golden-* headers."""
    changes: dict[str, Any] = {}
    for name in msgspec.structs.asdict(behaviour):
        if (value := request.headers.get("x-golden-" + name.replace("_", "-"))) is not None:
            changes[name] = value
    return (
        msgspec.convert(msgspec.structs.asdict(behaviour) | changes, Behaviour, strict=False) if changes else behaviour
    )


def main() -> None:
    """Serve until killed; the first line of output is the URL."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--behaviour", default="{}", help="JSON of the Behaviour fields")
    arguments = parser.parse_args()
    behaviour = msgspec.json.decode(arguments.behaviour.encode(), type=Behaviour)
    asyncio.run(_serve(behaviour, arguments.port))


async def _serve(behaviour: Behaviour, port: int) -> None:
    runner = web.AppRunner(GoldenServer(behaviour).application(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    host, bound = runner.addresses[0][:2]
    sys.stdout.write(f"http://{host}:{bound}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
