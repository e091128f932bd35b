"""Random weights for a model of which only config.json is there: to measure speed, never to read its output."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from tabstop.quant import StoredTensor, TensorRead
from tabstop.quant.encodings import ENCODINGS, TensorInfo

STANDARD_DEVIATION = 0.02


class DummySource:
    """Holds exactly the tensors that the model asks for. A value depends on (seed, name, place) alone, not on slices.

    Matrices are normal with a small deviation, vectors are ones (norms) or zeros (biases).
    """

    def __init__(self, reads: Iterable[TensorRead], seed: int, device: str = "cpu") -> None:
        """`device`: where values are made; a GPU makes other ones than a CPU, a thousand times faster."""
        self.seed = seed
        self.device = device
        self.tensors = {
            read.name: TensorInfo(read.shape, ENCODINGS["F32"], 4 * torch.Size(read.shape).numel()) for read in reads
        }
        self._newest: tuple[str, torch.Tensor] | None = None  # reads come window by window

    def read(self, read: TensorRead) -> StoredTensor:
        if self._newest is None or self._newest[0] != read.name:
            self._newest = read.name, self._make(read)
        return StoredTensor(ENCODINGS["F32"], self._newest[1][read.slices])

    def _make(self, read: TensorRead) -> torch.Tensor:
        if len(read.shape) == 1:
            return torch.full(read.shape, 0.0 if read.name.endswith(".bias") else 1.0, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {read.name}".encode()))
        return torch.randn(read.shape, generator=generator, device=self.device).mul_(STANDARD_DEVIATION)
