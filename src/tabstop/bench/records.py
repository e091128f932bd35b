"""What is asked of a server and what came back, as plain data that crosses processes and files.

Times are seconds since the start of the run (one monotonic clock for all worker processes). Knows no HTTP and computes
no metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal

import msgspec

from tabstop.errors import InputError

Outcome = Literal["ok", "error", "timeout", "cancelled", "superseded"]
CountSource = Literal["server", "usage", "tokenizer", "apportioned", "chunks", "none"]


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class Turn(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One request. One of `ids`, `text`, `messages` carries the prompt; `suffix` makes `text` a hole's start."""

    ids: list[int] = []
    text: str = ""
    messages: list[Message] = []
    suffix: str | None = None
    max_tokens: int = 16
    ignore_end: bool = False  # generate exactly max_tokens where the dialect can ask for it
    num_prompt_tokens: int | None = None  # what the server must report, where the workload knows it
    kind: str = "request"  # label for slices: "completion", "chat", "agent", …
    delay: float = 0.0  # think time after the previous turn's end, or after its start if `supersedes`. unit: seconds
    supersedes: bool = False  # cancels the session's previous turn if that still runs
    cancel_after: float | None = None  # the client hangs up so long after sending. unit: seconds
    carries_answer: bool = False  # the prompt is the previous one, the server's own answer, then this turn's


class Session(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Turns of one user, in order. A plain request is a session of one turn."""

    index: int
    turns: list[Turn]
    start: float | None = None  # intended send time of the first turn (open loop), None in a closed loop


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """One event of a stream that brought text or tokens."""

    at: float
    num_tokens: int  # -1 while unknown
    num_chars: int = 0


class Record(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One request's story. Client fills all but `count_source` and counts; tokens.py fills those."""

    session: int
    turn: int = 0
    num_turns: int = 1  # of its session
    kind: str = "request"
    is_whole: bool = False  # asked for in one body: no first token is seen, only the end
    intended: float
    sent: float
    ended: float
    chunks: list[Chunk] = []
    outcome: Outcome = "ok"
    error: str = ""
    finish_reason: str | None = None
    max_tokens: int = 0
    expected_prompt_tokens: int | None = None
    prompt_tokens: int | None = None  # as the server says
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    counted_tokens: int | None = None  # sum over the stream, by `count_source`
    retokenized_tokens: int | None = None  # by a local tokenizer, from the text
    count_source: CountSource = "none"
    text: str = ""
    digest: str = ""  # of the text, for comparing greedy answers without keeping them

    @property
    def lag(self) -> float:
        """How late the client itself was. unit: seconds"""
        return self.sent - self.intended

    @property
    def num_tokens(self) -> int:
        """Completion tokens: the server's count, else ours."""
        return self.completion_tokens if self.completion_tokens is not None else self.counted_tokens or 0


class ClientHealth(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One worker process's own state during a run."""

    worker: int = 0
    cpu_share: float = 0.0  # CPU seconds / wall seconds
    loop_lag_p99: float = 0.0  # how late the event loop woke a timer. unit: seconds
    num_bytes: int = 0


def write_jsonl(path: Path, records: Iterable[Record], *, keep_text: bool = False) -> None:
    """One record a line. Texts are dropped unless asked for; their digests stay."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for record in records:
            kept = record if keep_text else msgspec.structs.replace(record, text="")
            file.write(encoder.encode(kept) + b"\n")


def read_jsonl(path: Path) -> list[Record]:
    """Raises InputError, naming the line, for a file that is not a run's records."""
    with path.open("rb") as file:
        return list(_decode_lines(file, path))


def _decode_lines(file: IO[bytes], path: Path) -> Iterator[Record]:
    decoder = msgspec.json.Decoder(Record)
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise InputError(f"{path} line {number} is not a request record: {error}") from None
