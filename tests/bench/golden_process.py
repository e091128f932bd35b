"""A golden server in a process of its own, for tests that go through real sockets."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from tabstop.bench.client import Endpoint
from tabstop.bench.dialects import Sampling
from tabstop.bench.golden import MODEL, Behaviour, Told
from tabstop.bench.records import Record
from tabstop.bench.tokens import LocalTokenizer, resolve


@contextmanager
def golden_server(behaviour: Behaviour | None = None) -> Iterator[str]:
    """Yields the URL."""
    told = msgspec.json.encode(behaviour or Behaviour(ttft=0.01, rate=1000)).decode()
    command = [sys.executable, "-m", "tabstop.bench.golden", "--behaviour", told]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def truth(url: str) -> dict[str, Told]:
    """What the server says it sent, by request."""
    with urllib.request.urlopen(url + "/golden/log") as response:
        told = msgspec.json.decode(response.read(), type=list[Told])
    return {one.request: one for one in told}


def endpoint(url: str, dialect: str = "openai-completions", **behaviour: object) -> Endpoint:
    headers = {"x-golden-" + name.replace("_", "-"): str(value) for name, value in behaviour.items()}
    model = MODEL if dialect.startswith("openai") else ""
    return Endpoint(url=url, dialect=dialect, sampling=Sampling(model=model), headers=headers, timeout=20.0)


def wrong_accounts(records: list[Record], told: dict[str, Told], tokenizer: LocalTokenizer | None = None) -> list[str]:
    """One line for each record whose text, chunks or token counts differ from the truth."""
    wrong = []
    for record in records:
        resolve(record, tokenizer)
        true = told[f"{record.session}-{record.turn}"]
        seen = [(c.num_tokens, c.num_chars) for c in record.chunks]
        sent = [(s.num_tokens, s.num_chars) for s in true.sent]
        if seen != sent or record.text != true.text or (true.is_whole and record.outcome != "ok"):
            wrong.append(f"{record.session}: {record.outcome} {record.error} {seen} {sent}")
        elif record.outcome == "ok" and record.prompt_tokens not in (None, true.prompt_tokens):
            wrong.append(f"{record.session}: prompt {record.prompt_tokens} is {true.prompt_tokens}")
    return wrong
