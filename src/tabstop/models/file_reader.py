"""Reads parts of weight files into memory of their own.

Not through memory maps: their pages would stay resident beside the weights, and a file that shrinks while it is mapped
ends the process; here it is an error.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import torch

from tabstop.errors import CheckpointError
from tabstop.quant.encodings import Encoding, TensorInfo

LARGE_BYTES = 1 << 20
"""From here on memory comes from the system and goes back at once; the C library's heap would keep holes that add up to
a third of the weights."""

TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Encoding → type of its values; all others are read as bytes."""


def read_rows(path: Path, offset: int, info: TensorInfo, rows: slice) -> torch.Tensor:
    """Rows of a tensor that starts at `offset`: [rows, ...] in its own type, of blocks uint8 [rows, bytes of a row].

    Raises CheckpointError when the file ends before.
    """
    row_bytes = info.num_bytes // info.shape[0] if info.shape[0] else 0
    data = read_bytes(path, offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
    shape = (rows.stop - rows.start, *info.shape[1:])
    return typed(data, info.encoding, shape)


def typed(data: torch.Tensor, encoding: Encoding, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes as values of their type; blocks stay bytes, row by row."""
    if encoding.name in TORCH_TYPES:
        return data.view(TORCH_TYPES[encoding.name]).view(shape)
    return data.view(*shape[:-1], -1)


def read_bytes(path: Path, start: int, num_bytes: int) -> torch.Tensor:
    """uint8 [num_bytes]. Raises CheckpointError when the file ends before."""
    buffer: Any = mmap.mmap(-1, num_bytes) if num_bytes >= LARGE_BYTES else bytearray(num_bytes)
    rest = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(
                        f"{path} ends before byte {start + num_bytes}: it was cut while in use; download it again"
                    )
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    return torch.frombuffer(buffer, dtype=torch.uint8) if num_bytes else torch.empty(0, dtype=torch.uint8)
