"""How numbers are stored in checkpoint files: names, and how many bytes a block of values takes. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tabstop.errors import CheckpointError


class Encoding(NamedTuple):
    """Values along a matrix's last axis are stored in blocks of `block_values` values and `block_bytes` bytes."""

    name: str
    block_values: int
    block_bytes: int

    def num_bytes(self, num_values: int) -> int:
        """Size of a row of values. Raises CheckpointError when they are no whole number of blocks."""
        if num_values % self.block_values:
            raise CheckpointError(f"a row of {num_values} values is no whole number of {self.name} blocks")
        return num_values // self.block_values * self.block_bytes


ENCODINGS: dict[str, Encoding] = {
    name: Encoding(name, values, num_bytes)
    for name, values, num_bytes in (
        ("F64", 1, 8),
        ("F32", 1, 4),
        ("F16", 1, 2),
        ("BF16", 1, 2),
        ("Q4_0", 32, 18),
        ("Q4_1", 32, 20),
        ("Q5_0", 32, 22),
        ("Q5_1", 32, 24),
        ("Q8_0", 32, 34),
        ("Q2_K", 256, 84),
        ("Q3_K", 256, 110),
        ("Q4_K", 256, 144),
        ("Q5_K", 256, 176),
        ("Q6_K", 256, 210),
    )
}


FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
"""Encodings whose values need no decoding (8-bit floats do: they come with scales)."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says of one tensor."""

    shape: tuple[int, ...]
    encoding: Encoding
    num_bytes: int
