"""Tokens of a stream: how many each chunk brought, by the best source at hand, and whether the sources agree.

Order of trust: the server's own count in the stream; a local tokenizer over the text; the server's total spread over
the chunks; one token a chunk (marked unverified). Knows tokenizers and records, no sockets but RemoteCounter's.
"""

from __future__ import annotations

import bisect
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import tokenizers

from tabstop.bench.dialects import UNREADABLE
from tabstop.bench.records import Chunk, CountSource, Record
from tabstop.bench.servers import DIRECT
from tabstop.errors import InputError

Counter = Callable[[str], int]


class LocalTokenizer:
    """A tokenizer.json from a file or a folder."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> LocalTokenizer:
        """Raises InputError if there is no readable tokenizer.json."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"no tokenizer at {path}: give a tokenizer.json or a folder that holds one")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file} is not a tokenizer.json: {error}") from None

    @property
    def num_ids(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def ends(self, text: str) -> list[int]:
        """Where each token ends. unit: characters"""
        return [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]


class RemoteCounter:
    """Counts a text's tokens with the server's own /tokenize, whichever of the known forms it has."""

    FORMS = (("/tokenize", "prompt"), ("/tokenize", "content"), ("/tokenize", "inputs"), ("/extras/tokenize", "input"))

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        self.headers = {**(headers or {}), "content-type": "application/json"}
        root = url.rstrip("/").removesuffix("/v1")
        self.url, self.field = root, ""
        for path, field in self.FORMS:
            self.url, self.field = root + path, field
            try:
                if self("a b c d e") > 1:
                    return
            except InputError:
                continue
        raise InputError(f"{root} has no /tokenize that counts a text's tokens: give --tokenizer instead")

    def __call__(self, text: str) -> int:
        """Raises InputError when the server does not answer as a tokenizer would."""
        body = msgspec.json.encode({self.field: text, "add_special_tokens": False})
        request = urllib.request.Request(self.url, data=body, headers=self.headers)
        try:
            with DIRECT.open(request, timeout=30) as response:
                answer = msgspec.json.decode(response.read())
        except (urllib.error.URLError, OSError, http.client.HTTPException, *UNREADABLE) as error:
            raise InputError(f"{self.url} does not tokenise: {error}") from None
        tokens = answer.get("tokens", answer.get("count")) if isinstance(answer, dict) else answer
        if not isinstance(tokens, list | int):
            raise InputError(f"{self.url} does not tokenise: it answered without a list of tokens")
        return len(tokens) if isinstance(tokens, list) else tokens


def resolve(record: Record, tokenizer: LocalTokenizer | None = None) -> Record:
    """Fills the record's token counts: per chunk, in total and re-tokenised. Once: a second time changes nothing."""
    if record.counted_tokens is not None:
        return record
    if tokenizer is not None and record.text:
        record.retokenized_tokens = tokenizer.count(record.text)
    counts = [chunk.num_tokens for chunk in record.chunks]
    known = sum(max(0, count) for count in counts)
    total = record.completion_tokens
    if all(count >= 0 for count in counts) or (known and known == total):
        record.count_source = "server" if counts else "none"
        counts = [max(0, count) for count in counts]
    elif tokenizer is not None:
        record.count_source, counts = "tokenizer", count_by_text(record, tokenizer)
    elif total is not None:
        record.count_source, counts = _spread_total(record.chunks, total)
    elif record.is_whole:
        record.count_source, counts = "none", [0] * len(counts)  # one body says nothing of its tokens
    else:
        record.count_source, counts = "chunks", [int(chunk.num_chars > 0) for chunk in record.chunks]
    record.chunks = [Chunk(c.at, n, c.num_chars) for c, n in zip(record.chunks, counts, strict=True)]
    record.counted_tokens = sum(counts)
    return record


def count_by_text(record: Record, tokenizer: LocalTokenizer) -> list[int]:
    """Tokens whose last character each chunk brought."""
    ends = sorted(tokenizer.ends(record.text))
    counts, num_chars, before = [], 0, 0
    for chunk in record.chunks:
        num_chars += chunk.num_chars
        so_far = bisect.bisect_right(ends, num_chars)
        counts.append(so_far - before)
        before = so_far
    return counts


def _spread_total(chunks: list[Chunk], total: int) -> tuple[CountSource, list[int]]:
    """One token a chunk where that fits the server's total; else shares by characters, rounded so that they add up."""
    num_chunks = sum(chunk.num_chars > 0 for chunk in chunks)
    if num_chunks == total:
        return "usage", [int(chunk.num_chars > 0) for chunk in chunks]
    num_chars = sum(chunk.num_chars for chunk in chunks)
    counts, seen, before = [], 0, 0
    for chunk in chunks:
        seen += chunk.num_chars
        so_far = round(total * seen / num_chars) if num_chars else 0
        counts.append(so_far - before)
        before = so_far
    return "apportioned", counts
