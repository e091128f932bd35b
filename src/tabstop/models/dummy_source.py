"""Random weights for a model of which only config.json is there: to measure speed, never to read its output."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from functools import cached_property

import torch

from tabstop.quant import StoredTensor, TensorRead
from tabstop.quant.encodings import ENCODINGS, TensorInfo

STANDARD_DEVIATION = 0.02


class DummySource:
    """Holds exactly the tensors that the model asks for. A value depends on (seed, name, place) alone, not on slices.

    Matrices are normal with a small deviation, vectors are ones (norms) or zeros (biases).
    """

    def __init__(self, reads: Iterable[TensorRead], seed: int, device: str = "cpu") -> None:
        """`device`: where values are made; a GPU makes other ones than a CPU, a thousand times faster. There, a matrix
        that was read is valid until another is.
        """
        self.seed = seed
        self.device = device
        sizes = {read.name: (read.shape, math.prod(read.shape)) for read in reads}
        self.tensors = {name: TensorInfo(shape, ENCODINGS["F32"], 4 * size) for name, (shape, size) in sizes.items()}
        self._most_values = max((size for _, size in sizes.values()), default=0)
        self._newest: tuple[str, torch.Tensor] | None = None  # reads come window by window

    def read(self, read: TensorRead) -> StoredTensor:
        if self._newest is None or self._newest[0] != read.name:
            self._newest = read.name, self._make(read)
        return StoredTensor(ENCODINGS["F32"], self._newest[1][read.slices])

    @cached_property
    def _scratch(self) -> torch.Tensor:
        """One memory for all matrices in turn: pieces that were freed between weights would stay unused for ever."""
        return torch.empty(self._most_values, device=self.device)

    def _make(self, read: TensorRead) -> torch.Tensor:
        if len(read.shape) == 1:
            return torch.full(read.shape, 0.0 if read.name.endswith(".bias") else 1.0, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {read.name}".encode()))
        memory = torch.empty(math.prod(read.shape)) if self.device == "cpu" else self._scratch[: math.prod(read.shape)]
        return memory.view(read.shape).normal_(std=STANDARD_DEVIATION, generator=generator)
