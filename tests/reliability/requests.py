"""What clients ask, drawn at random: every kind of generating request, streamed or not."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

WORDS = ("def ", "return ", "x", " = ", "1", "\n    ", "if ", "self.", "print(", ")", "# what", "for i in range(", ":")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: where it goes, its body, and how many choices it wants."""

    path: str
    body: dict[str, Any]
    num_choices: int = 1

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    def to_bytes(self, *, keep_alive: bool = False) -> bytes:
        content = json.dumps(self.body).encode()
        connection = "keep-alive" if keep_alive else "close"
        head = f"POST {self.path} HTTP/1.1\r\nhost: localhost\r\nconnection: {connection}\r\n"
        return f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


def draw_ask(generator: random.Random, max_tokens: int = 60) -> Ask:
    """A completion, a chat, a hole in either dialect, or an answer under a schema."""
    text = "".join(generator.choices(WORDS, k=generator.randrange(1, 60)))
    shared = {"max_tokens": generator.randrange(1, max_tokens + 1), "stream": generator.random() < 0.7}
    kind = generator.choice(("completion", "several", "chat", "fim", "infill", "schema"))
    if kind == "completion":
        return Ask("/v1/completions", {"prompt": text, "ignore_eos": True, **shared})
    if kind == "several":
        number = generator.randrange(2, 5)
        return Ask("/v1/completions", {"prompt": text, "n": number, "stop": ["\n\n"], **shared}, number)
    if kind == "chat":
        return Ask("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **shared})
    if kind == "fim":
        return Ask("/v1/completions", {"prompt": text, "suffix": "\n    return x\n", **shared})
    if kind == "infill":
        count = {"n_predict": shared["max_tokens"], "stream": shared["stream"]}
        return Ask("/infill", {"input_prefix": text, "input_suffix": "\nreturn x\n", **count})
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    body = {"messages": [{"role": "user", "content": text}], "response_format": form}
    return Ask("/v1/chat/completions", {**body, **shared})


def long_stream(max_tokens: int = 1500) -> Ask:
    """A stream that is still there when the fault comes."""
    return Ask("/v1/completions", {"prompt": "def f", "max_tokens": max_tokens, "ignore_eos": True, "stream": True})
