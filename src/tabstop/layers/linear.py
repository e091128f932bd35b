"""Linear, embedding and head: they know which checkpoint matrices fill them and which slice of each is this rank's.

Arithmetic and storage belong to the quantization scheme (quant/); nothing else in the model multiplies by a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tabstop.layers import WHOLE, Split, share
from tabstop.quant import Loading, MatrixPart, Placement, QuantScheme, TensorRead, Weight


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix of the checkpoint inside a fused Linear: its name below the layer's prefix, its rows, its head size."""

    name: str
    rows: int
    unit: int = 1  # rows that a split keeps together
    placement: Placement | None = None  # where its rows lie in the named tensor; None: they are the whole of it


class Linear(nn.Module):
    """y = x W^T + b, W made of parts in row order.

    prefix: checkpoint path of the parts (may be empty) · columns: inputs · bias: every part has one · split: this
    rank's share. With split columns the outputs are partial sums, and only rank 0 adds the bias.
    """

    def __init__(
        self, prefix: str, columns: int, parts: Sequence[Part], *, bias: bool = False, split: Split = WHOLE
    ) -> None:
        super().__init__()
        self.parts = [_matrix_part(prefix, columns, part, split) for part in parts]
        self.has_bias = bias
        self.adds_bias = bias and (split.axis != "columns" or split.rank == 0)
        self.rows = sum(part.num_rows for part in self.parts)  # outputs of this rank
        self.weight: Weight | None = None
        self.bias: torch.Tensor | None = None

    def reads(self, scheme: QuantScheme) -> list[TensorRead]:
        reads = [read for part in self.parts for read in scheme.reads(part)]
        return reads + [read for part in self.parts if self.has_bias for read in _bias_reads(part)]

    def load(self, loading: Loading) -> None:
        self.weight = loading.scheme.load(self.parts, loading)
        if self.adds_bias:
            self.bias = torch.cat([_load_bias(part, loading) for part in self.parts])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] → [T, rows]."""
        assert self.weight is not None, "not loaded"
        return self.weight.multiply(x, self.bias)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] → SiLU(first half of the rows) · second half, [T, rows / 2]."""
        assert self.weight is not None, "not loaded"
        return self.weight.multiply_gated(x, self.bias)


def _matrix_part(prefix: str, columns: int, part: Part, split: Split) -> MatrixPart:
    name = f"{prefix}.{part.name}" if prefix else part.name
    rows, ours = slice(0, part.rows), slice(0, columns)
    if split.axis == "rows":
        rows = share(part.rows, part.unit, split.rank, split.size)
    elif split.axis == "columns":
        ours = share(columns, part.unit, split.rank, split.size)
    stored_rows = part.rows if part.placement is None else part.placement.num_rows
    return MatrixPart(name, (stored_rows, columns), rows, ours, part.placement)


def _bias_reads(part: MatrixPart) -> list[TensorRead]:
    return [TensorRead(f"{part.name}.bias", part.shape[:1], (run,)) for run in part.runs]


def _load_bias(part: MatrixPart, loading: Loading) -> torch.Tensor:
    return part.arranged(torch.cat([loading.vector(read) for read in _bias_reads(part)]))


class Embedding(nn.Module):
    """Token id → vector. Its matrix may also be the head's."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.part = MatrixPart(name, (vocab_size, hidden_size), slice(0, vocab_size), slice(0, hidden_size))
        self.weight: Weight | None = None

    def reads(self, scheme: QuantScheme) -> list[TensorRead]:
        return scheme.reads(self.part)

    def load(self, loading: Loading) -> None:
        self.weight = loading.scheme.load([self.part], loading)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [T] → [T, hidden]."""
        assert self.weight is not None, "not loaded"
        return self.weight.gather(ids)


class ScaledEmbedding(Embedding):
    """Its vectors are multiplied by a number; a head that is tied to it is not."""

    def __init__(self, name: str, vocab_size: int, hidden_size: int, factor: float) -> None:
        super().__init__(name, vocab_size, hidden_size)
        self.factor = factor

    def load(self, loading: Loading) -> None:
        super().load(loading)
        self.factor = torch.tensor(self.factor, dtype=loading.dtype).item()  # as those who trained it rounded it

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.factor


class Head(Linear):
    """Hidden state → logits, by a matrix of its own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] → float32 [R, vocab_size]."""
        assert self.weight is not None, "not loaded"
        logits = self.weight.multiply_wide(hidden)
        return logits if self.bias is None else logits + self.bias


class TiedHead(nn.Module):
    """Hidden state → logits by the embedding's own matrix; owns no weights."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] → float32 [R, vocab_size]."""
        assert self.embedding.weight is not None, "not loaded"
        return self.embedding.weight.multiply_wide(hidden)
