"""Asks an endpoint to fill a hole: POST /v1/completions with `suffix`. Knows HTTP; judges nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from tabstop.config import from_environment, option
from tabstop.errors import ConfigError, InputError
from tabstop.evaluation import NOT_JSON, Filling, Task, printable

MAX_BODY = 4 << 20  # bytes of an answer
HEALING: Mapping[str, dict[str, bool]] = {"auto": {}, "off": {"token_healing": False}, "on": {"token_healing": True}}
"""--healing → what a request says of it; auto leaves it to the server."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What comes from the environment: TABSTOP_EVAL_API_KEY is sent as a bearer token."""

    eval_api_key: str | None = option(None, "key that the endpoint wants")


@dataclass(frozen=True, slots=True)
class Question:
    """What all requests of a run have in common."""

    url: str  # without a path, or up to /v1
    model: str = ""
    max_tokens: int = 64
    temperature: float = 0.0
    is_line: bool = False  # the answer ends with its first line end
    healing: str = "auto"
    timeout: float = 600.0
    seed: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def body(self, task: Task) -> dict[str, Any]:
        """An empty suffix asks for no hole on this path, so the end of a file is a line end, as editors send it."""
        fields: dict[str, Any] = {"prompt": task.prompt, "suffix": task.suffix or "\n", "max_tokens": self.max_tokens}
        fields |= {"temperature": self.temperature, "seed": self.seed} | HEALING[self.healing]
        return fields | ({"model": self.model} if self.model else {}) | ({"stop": ["\n"]} if self.is_line else {})


def check_question(question: Question) -> None:
    """Raises ConfigError."""
    parts = urlsplit(question.url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{question.url!r} is no address of a server; give one like http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ConfigError("the address holds a user or a password; set TABSTOP_EVAL_API_KEY instead")
    if question.healing not in HEALING:
        raise ConfigError(f"--healing is {question.healing!r}; choose one of {', '.join(HEALING)}")


def open_session(question: Question) -> aiohttp.ClientSession:
    key = from_environment(Credentials).eval_api_key
    headers = question.headers | ({"authorization": f"Bearer {key}"} if key else {})
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=question.timeout))


async def first_model(session: aiohttp.ClientSession, question: Question) -> str:
    """The model that the server lists first. Raises InputError where nobody answers."""
    url = f"{question.base}/v1/models"
    try:
        async with session.get(url, allow_redirects=False) as response:
            content, status = await _read(response), response.status
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise InputError(f"no server answers at {question.base}: {_one_line(error)}") from None
    if status != 200:
        hint = "; set TABSTOP_EVAL_API_KEY" if status in (401, 403) else ""
        raise InputError(f"{url} answers {status}{hint}")
    try:
        return printable(msgspec.json.decode(content)["data"][0]["id"])
    except (*NOT_JSON, LookupError, TypeError):
        raise InputError(f"{url} lists no model; give --model") from None


async def ask(session: aiohttp.ClientSession, question: Question, task: Task) -> Filling:
    """The text for one hole; `problem` says why there is none. Raises nothing but CancelledError."""
    start = time.perf_counter()
    try:
        async with session.post(
            f"{question.base}/v1/completions", json=question.body(task), allow_redirects=False
        ) as response:
            content = await _read(response)
            filled = _parsed(content) if response.status == 200 else Filling(problem=_refusal(response.status, content))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        filled = Filling(problem=_one_line(error))
    return msgspec.structs.replace(filled, seconds=time.perf_counter() - start)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = b""
    async for piece in response.content.iter_any():
        content += piece
        if len(content) > MAX_BODY:
            raise ValueError(f"the answer is over {MAX_BODY} bytes")
    return content


def _parsed(content: bytes) -> Filling:
    try:
        body = msgspec.json.decode(content)
        choice, usage, said = body["choices"][0], body.get("usage") or {}, body.get("tabstop") or {}
        return Filling(
            text=str(choice["text"]),
            finish_reason=str(choice.get("finish_reason")),
            num_tokens=int(usage.get("completion_tokens") or 0),
            num_healed_tokens=int(said.get("healed_tokens") or 0),
        )
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        return Filling(problem="the answer is no completion")


def _refusal(status: int, content: bytes) -> str:
    try:
        return f"{status}: {_one_line(msgspec.json.decode(content)['error']['message'])}"
    except (*NOT_JSON, LookupError, TypeError):
        return f"status {status}"


def _one_line(said: object) -> str:
    said = (isinstance(said, OSError) and said.strerror) or said
    return printable(" ".join(str(said).split()) or type(said).__name__)
