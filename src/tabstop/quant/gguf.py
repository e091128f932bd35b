"""GGUF's block encodings, decoded to float32 with plain torch operations on whichever device the blocks lie.

The layouts are those of the GGUF format (a block is a run of values along a row with its scales before or after the
packed integers). The scheme decodes at load; a scheme that keeps packed blocks reads the same tensors and replaces
`load`, with `dequantize` as its twin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tabstop.quant import Loading, MatrixPart, StoredTensor, TensorRead
from tabstop.quant.dense import DenseWeight, load_dense, weight_reads
from tabstop.quant.encodings import FLOATS, Encoding


class GGUFScheme:
    """One tensor `<part>.weight` for each part, each in an encoding of its own."""

    name = "gguf"
    compute_dtype: str | None = None
    description = "gguf, decoded"

    def num_bytes(self, read: TensorRead, encoding: Encoding, dtype_bytes: int) -> int:
        return read.num_values * dtype_bytes

    def reads(self, part: MatrixPart) -> list[TensorRead]:
        return [read._replace(encodings=READABLE) for read in weight_reads(part)]

    def load(self, parts: Sequence[MatrixPart], loading: Loading) -> DenseWeight:
        return load_dense(parts, loading, dequantize)


def dequantize(stored: StoredTensor) -> torch.Tensor:
    """Stored blocks [rows, bytes] → float32 [rows, values]; floats pass through in their own dtype."""
    if stored.encoding.name in FLOATS:
        return stored.data
    blocks = stored.data.reshape(-1, stored.encoding.block_bytes)
    return DECODERS[stored.encoding.name](blocks).reshape(stored.data.shape[0], -1)


def half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at a byte offset of each block, as float32 [blocks, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n] → [..., 2, n]: all low halves, then all high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def fields(packed: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [..., n] → [..., 8 / width, n]: the fields of `width` bits of each byte, lowest first."""
    return torch.stack([(packed >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], dim=-2)


def bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 4] → [blocks, 32]: one bit a value, the lowest of the first byte first."""
    return fields(packed, 1).transpose(1, 2).reshape(len(packed), 32)


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return (nibbles(blocks[:, 2:18]).flatten(1).float() - 8) * half(blocks, 0)


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return nibbles(blocks[:, 4:20]).flatten(1).float() * half(blocks, 0) + half(blocks, 2)


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = nibbles(blocks[:, 6:22]).flatten(1) | (bits(blocks[:, 2:6]) << 4)
    return (values.float() - 16) * half(blocks, 0)


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = nibbles(blocks[:, 8:24]).flatten(1) | (bits(blocks[:, 4:8]) << 4)
    return values.float() * half(blocks, 0) + half(blocks, 2)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:34].view(torch.int8).float() * half(blocks, 0)


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 groups of 16 values of 2 bits; a byte for each group holds its scale (low half) and minimum (high half)."""
    scales = (blocks[:, :16] & 15).float() * half(blocks, 80)
    minima = (blocks[:, :16] >> 4).float() * half(blocks, 82)
    values = fields(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return values.float() * scales[:, :, None] - minima[:, :, None]


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 groups of 16 values of 2 bits and a mask whose clear bits take 4 away; scales of 6 bits, offset 32."""
    low = nibbles(blocks[:, 96:104]).flatten(1)
    high = fields(blocks[:, 104:108], 2).flatten(1)
    scales = ((low | (high << 4)).float() - 32) * half(blocks, 108)
    values = fields(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    kept = fields(blocks[:, :32], 1).reshape(-1, 16, 16).float()
    return (values - 4 * (1 - kept)) * scales[:, :, None]


def scales_and_minima(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes 0 to 15 of Q4_K and Q5_K → scales and minima, float32 [blocks, 8, 1].

    Two float16 factors, then eight scales and eight minima of 6 bits in 12 bytes: the first four of each lie in the low
    bits of bytes 0-3 and 4-7; the last four have their low 4 bits in bytes 8-11 and their high 2 on top of the first.
    """
    first_scales, first_minima, low = (blocks[:, 4:16].reshape(-1, 3, 4)).unbind(1)
    scales = torch.cat((first_scales & 63, (low & 15) | (first_scales >> 6 << 4)), dim=1)
    minima = torch.cat((first_minima & 63, (low >> 4) | (first_minima >> 6 << 4)), dim=1)
    return (scales.float() * half(blocks, 0))[:, :, None], (minima.float() * half(blocks, 2))[:, :, None]


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = scales_and_minima(blocks)
    values = nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return values.float() * scales - minima


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = scales_and_minima(blocks)
    low = nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    values = low | (fields(blocks[:, 16:48], 1) << 4)
    return values.float() * scales - minima


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Two halves of 128 values: 4 low bits in 64 bytes, 2 high bits in 32; 16 int8 scales, one for 16 values."""
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    scales = blocks[:, 192:208].view(torch.int8).float() * half(blocks, 208)
    return ((low | (high << 4)).float() - 32).reshape(-1, 16, 16) * scales[:, :, None]


DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
"""Encoding → function of uint8 [blocks, bytes of a block] to float32 [blocks, …]."""

READABLE = FLOATS | frozenset(DECODERS)
