"""Reads the head of a GGUF file: key-value metadata and where each tensor lies. Knows no torch and no architecture.

Every length and offset in the file is checked against the file's size before it is believed. The layout is that of the
GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabstop.errors import CheckpointError
from tabstop.quant.encodings import ENCODINGS, Encoding

TENSOR_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 28: "F64", 30: "BF16"} | {
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
}
"""The file's type number → encoding that we can read."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata value type → struct code; 8 is a string, 9 an array."""
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 256
MAX_ARRAY_DEPTH = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of the file. `shape` counts rows first, as in the Hub's checkpoints."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def shown(value: Any) -> str:
    """A value of a file as it may appear in a message: repr, cut short."""
    text = repr(value[:8] if isinstance(value, list) else value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is damaged or truncated: {what} at byte {self.position} of {len(self.data)}; "
            "download the file again"
        )

    def take(self, num_bytes: int, what: str) -> int:
        """Advances and returns where the bytes start."""
        start = self.position
        if num_bytes > len(self.data) - start:
            raise self.error(f"{what} reaches past the end of the file")
        self.position += num_bytes
        return start

    def scalar(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self, what: str) -> str:
        length = self.scalar("Q", what)
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def name(self, what: str) -> str:
        """A string that may be shown to people: anything else is damage."""
        text = self.string(what)
        if len(text) > MAX_NAME_BYTES or not text.isprintable():
            raise self.error(f"{what} is not readable")
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """`string`, `count` times; one loop without calls, since vocabularies hold 300,000 of them."""
        data, position, end = self.data, self.position, len(self.data)
        read_length: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            if position + 8 > end:
                raise self.error(f"{what} reaches past the end of the file")
            length = read_length(data, position)[0]
            start = position + 8
            position = start + length
            if position > end:
                raise self.error(f"{what} reaches past the end of the file")
            texts.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return texts

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY and depth < MAX_ARRAY_DEPTH:
            element, count = self.scalar("I", what), self.scalar("Q", what)
            return self.array(element, count, what, depth + 1)
        raise self.error(f"{what} has the unknown value type {kind}")

    def array(self, element: int, count: int, what: str, depth: int) -> list[Any]:
        if element in SCALARS:
            start = self.take(count * struct.calcsize("<" + SCALARS[element]), what)
            return list(struct.unpack_from(f"<{count}{SCALARS[element]}", self.data, start))
        if element == STRING:
            return self.strings(count, what)
        return [self.value(element, what, depth) for _ in range(count)]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table. Raises CheckpointError for anything but a whole, readable GGUF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(path, data))
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise CheckpointError(f"cannot read {path}: {error}") from None


def _read(cursor: _Cursor) -> GGUFHeader:
    path = cursor.path
    magic = cursor.take(4, "the magic number")
    if cursor.data[magic : magic + 4] != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file (it does not start with 'GGUF')")
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        raise CheckpointError(f"{path} has GGUF version {version}; versions 2 and 3 (little-endian) can be read")
    num_tensors, num_pairs = cursor.scalar("Q", "the number of tensors"), cursor.scalar("Q", "the number of keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.name("a metadata key")
        metadata[key] = cursor.value(cursor.scalar("I", key), key)
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts of a model; join them into one file first "
            "(llama-gguf-split --merge)"
        )
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    return GGUFHeader(path, metadata, _place_tensors(cursor, metadata.get("general.alignment", 32), entries))


Entry = tuple[str, tuple[int, ...], Encoding, int]
"""(name, shape rows first, encoding, offset in the data section)"""


def _place_tensors(cursor: _Cursor, alignment: Any, entries: list[Entry]) -> dict[str, GGUFTensor]:
    """Where each tensor lies in the file; the data section starts at the first aligned byte after the table."""
    path = cursor.path
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {shown(alignment)}; it must be a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, encoding, offset in entries:
        if name in tensors:
            raise CheckpointError(f"{path} lists the tensor {name} twice")
        num_bytes = math.prod(shape[:-1]) * encoding.num_bytes(shape[-1])
        if offset % alignment or start + offset + num_bytes > len(cursor.data):
            raise CheckpointError(
                f"{path} is damaged or truncated: tensor {name} would end at byte {start + offset + num_bytes} "
                f"of {len(cursor.data)}; download the file again"
            )
        tensors[name] = GGUFTensor(name, shape, encoding, start + offset, num_bytes)
    return tensors


def _tensor_entry(cursor: _Cursor) -> Entry:
    name = cursor.name("a tensor name")
    num_dimensions = cursor.scalar("I", name)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name} has {num_dimensions} dimensions")
    shape = tuple(cursor.scalar("Q", name) for _ in range(num_dimensions))[::-1]
    kind = cursor.scalar("I", name)
    if kind not in TENSOR_TYPES:
        known = ", ".join(sorted(TENSOR_TYPES.values()))
        raise CheckpointError(f"{cursor.path}: tensor {name} has GGUF type number {kind}; readable types are {known}")
    return name, shape, ENCODINGS[TENSOR_TYPES[kind]], cursor.scalar("Q", name)
