"""What an endpoint is, before it is measured: its dialect, model, and whether it does what requests ask of it.

One small request with a prompt of its own tells most mistakes apart, each as one InputError. Knows no load.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from tabstop.bench.client import Client, Endpoint, monotonic_since, open_session, prepare, read_body
from tabstop.bench.dialects import DIALECTS, UNREADABLE, OpenAIChat, make_dialect
from tabstop.bench.records import Message, Record, Turn
from tabstop.bench.tokens import resolve
from tabstop.errors import InputError

PROBE_TOKENS = 3
IDENTITY_PATHS = ("/version", "/info", "/props", "/v1/models")


class ServerFacts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the server says about itself, and what the probe found."""

    models: list[str] = []
    takes_ids: bool = False
    num_added: int = 0  # tokens the server puts before a text (start token, chat template)
    reports_usage: bool = False
    reports_cache: bool = False
    identity: dict[str, Any] = {}  # answers of /version, /info, …
    server_header: str = ""


def probe(endpoint: Endpoint, count: Callable[[str], int] | None = None) -> tuple[Endpoint, ServerFacts]:
    """The endpoint with dialect and model filled in. `count`: text → tokens, to find what the server adds.

    Raises InputError: unreachable, unknown model, broken streams, max_tokens ignored.
    """
    return asyncio.run(_probe(endpoint, count))


async def _probe(endpoint: Endpoint, count: Callable[[str], int] | None) -> tuple[Endpoint, ServerFacts]:
    facts = ServerFacts()
    async with open_session(endpoint) as session:
        await _identify(session, endpoint, facts)
        endpoint = _complete(endpoint, facts)
        dialect = make_dialect(endpoint.dialect)
        if dialect.takes_ids:
            ids = [secrets.randbelow(800) + 100 for _ in range(7)]
            by_ids = await _ask(session, endpoint, Turn(ids=ids, max_tokens=PROBE_TOKENS, ignore_end=True))
            facts.takes_ids = by_ids.outcome == "ok" and by_ids.prompt_tokens in (None, len(ids), len(ids) + 1)
        text = f" probe {secrets.token_hex(4)} x y z"
        turn = Turn(text=text, max_tokens=PROBE_TOKENS, ignore_end=True)
        if dialect.name == OpenAIChat.name:
            turn = msgspec.structs.replace(turn, text="", messages=[Message("user", text.strip())])
        record = resolve(await _ask(session, endpoint, turn))
    if record.outcome != "ok":
        raise InputError(_explain(endpoint, record, facts))
    if record.num_tokens > PROBE_TOKENS and record.count_source in ("server", "usage"):
        raise InputError(
            f"{endpoint.url} ignores max_tokens: {PROBE_TOKENS} were asked for, {record.num_tokens} came; "
            "work cannot be made equal, so it is not measured"
        )
    facts.reports_usage = record.completion_tokens is not None
    facts.reports_cache = record.cached_tokens is not None
    if count is not None and record.prompt_tokens is not None:
        facts.num_added = max(0, record.prompt_tokens - count(text.strip() if turn.messages else text))
    return endpoint, facts


async def _identify(session: aiohttp.ClientSession, endpoint: Endpoint, facts: ServerFacts) -> None:
    root = root_of(endpoint.url)
    for path in IDENTITY_PATHS:
        try:
            async with session.get(root + path, timeout=aiohttp.ClientTimeout(total=30)) as response:
                facts.server_header = _printable(response.headers.get("server", facts.server_header))
                if response.status == 200 and "json" in response.headers.get("content-type", ""):
                    facts.identity[path] = _trim(msgspec.json.decode(await read_body(response)))
        except (aiohttp.ClientConnectionError, TimeoutError, OSError) as error:
            told = str(error).replace(" ssl:default", "") or type(error).__name__
            raise InputError(f"cannot reach {root}: {told}; is the server running, is the port right?") from None
        except (aiohttp.ClientError, InputError, *UNREADABLE):
            continue
    listed = facts.identity.get("/v1/models")
    if isinstance(listed, dict) and isinstance(listed.get("data"), list):
        facts.models = [str(m["id"]) for m in listed["data"] if isinstance(m, dict) and "id" in m]


def root_of(url: str) -> str:
    """The URL without /v1 or a dialect's path."""
    url = url.rstrip("/")
    for dialect in DIALECTS.values():
        url = url.removesuffix(dialect.path)
    return url.removesuffix("/v1")


def _complete(endpoint: Endpoint, facts: ServerFacts) -> Endpoint:
    dialect = endpoint.dialect
    if dialect == "auto":
        by_path = [d.name for d in DIALECTS.values() if endpoint.url.rstrip("/").endswith(d.path)]
        if by_path:
            dialect = by_path[0]
        elif facts.models:
            dialect = "openai-completions"
        elif "/info" in facts.identity:
            dialect = "tgi"
        elif "/props" in facts.identity:
            dialect = "llama-cpp"
        else:
            dialect = "openai-completions"
    sampling = endpoint.sampling
    if not sampling.model and facts.models:
        sampling = msgspec.structs.replace(sampling, model=facts.models[0])
    return msgspec.structs.replace(endpoint, url=root_of(endpoint.url), dialect=dialect, sampling=sampling)


async def _ask(session: aiohttp.ClientSession, endpoint: Endpoint, turn: Turn) -> Record:
    client = Client(endpoint, session, monotonic_since(0.0))
    record = Record(session=secrets.randbelow(2**40), intended=0.0, sent=0.0, ended=0.0, max_tokens=turn.max_tokens)
    return await client.perform(prepare(endpoint, client.dialect, turn), record)


def _explain(endpoint: Endpoint, record: Record, facts: ServerFacts) -> str:
    model = endpoint.sampling.model
    if record.error.startswith(("HTTP 404", "HTTP 400")) and facts.models and model not in facts.models:
        return f"{endpoint.url} does not know the model {model!r}; it offers {', '.join(facts.models[:8])}"
    if record.error.startswith(("HTTP 401", "HTTP 403")):
        return f"{endpoint.url} wants a key: {record.error}; set TABSTOP_BENCH_API_KEY"
    hint = "; is the dialect right (--dialect)?" if record.error.startswith(("HTTP 404", "HTTP 405")) else ""
    return f"{endpoint.url} does not answer as {endpoint.dialect}: {record.error}{hint}"


def _printable(header: str) -> str:
    """A header without the surrogates that stand for bytes which are no UTF-8: no report could be written with them."""
    return header.encode("utf-8", "replace").decode()


def _trim(value: Any, depth: int = 0) -> Any:
    """A server's self-description, without its long texts (chat templates)."""
    if isinstance(value, dict):
        return {str(k): _trim(v, depth + 1) for k, v in list(value.items())[:60]} if depth < 4 else "…"
    if isinstance(value, list):
        return [_trim(v, depth + 1) for v in value[:20]] if depth < 4 else "…"
    return value[:200] if isinstance(value, str) else value
