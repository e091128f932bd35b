"""Layers: each owns its checkpoint names and its split, and holds plain tensors once loaded (no gradients anywhere).

A layer is built without weights, so that a model's names, shapes and sizes are known before anything is read; the
loader then asks every `Loadable` module for its reads, checks them against the checkpoint, and lets it load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tabstop.errors import UnsupportedModelError
from tabstop.quant import Loading, QuantScheme, TensorRead


@runtime_checkable
class Loadable(Protocol):
    """A module with weights of its own."""

    def reads(self, scheme: QuantScheme) -> Sequence[TensorRead]:
        """Every checkpoint tensor that `load` will read, with the shape it must have."""
        ...

    def load(self, loading: Loading) -> None:
        """Reads its tensors and keeps them on the loading's device."""
        ...


@dataclass(frozen=True, slots=True)
class Split:
    """How one rank of several takes its share of a matrix along one axis."""

    axis: str | None = None  # "rows", "columns" or None: every rank holds all
    rank: int = 0
    size: int = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank among the tensor-parallel ranks."""

    rank: int = 0
    size: int = 1

    @property
    def rows(self) -> Split:
        """Outputs are divided: each rank computes its own (q, k, v, gate, up)."""
        return Split("rows", self.rank, self.size)

    @property
    def columns(self) -> Split:
        """Inputs are divided: the ranks' results are summed (attention output, down)."""
        return Split("columns", self.rank, self.size)


SINGLE = Shard()
WHOLE = Split()


def share(total: int, unit: int, rank: int, size: int) -> slice:
    """This rank's part of `total` rows or columns that come in units (heads) which stay together.

    Units are dealt out in order. When there are fewer units than ranks, neighbouring ranks hold the same unit. Raises
    UnsupportedModelError when neither number divides the other.
    """
    assert total % unit == 0
    num_units = total // unit
    if num_units % size == 0:
        step = num_units // size * unit
        return slice(rank * step, (rank + 1) * step)
    if size % num_units == 0:
        index = rank * num_units // size
        return slice(index * unit, (index + 1) * unit)
    raise UnsupportedModelError(f"{num_units} heads (or columns) cannot be divided among {size} ranks; use a divisor")
