"""Quantization schemes: how a matrix is read from a checkpoint, held in memory and multiplied. Protocol and registry.

A layer says which matrices of the checkpoint it is made of and which rows and columns of each are this rank's; a scheme
knows everything else: the names and shapes of the stored tensors, packing, and the arithmetic. The parts of one fused
matrix may be stored in different encodings (GGUF files mix them). A new scheme is one file and one line in SCHEMES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tabstop.errors import UnsupportedModelError
from tabstop.quant.encodings import FLOATS, Encoding

if TYPE_CHECKING:
    import torch

SCHEMES: dict[str, str] = {
    "dense": "tabstop.quant.dense:DenseScheme",
    "gguf": "tabstop.quant.gguf:GGUFScheme",
}
"""Name → module:class, imported when a checkpoint needs it."""

CPU_SCHEMES: dict[str, str] = {
    "tiles": "tabstop.quant.tiles:TileScheme",
    "prepacked": "tabstop.quant.prepacked:PrepackedScheme",
}
"""Forms that a CPU multiplies fast, in order of preference; made with the checkpoint's own scheme, which reads."""


class TensorRead(NamedTuple):
    """A slice of one checkpoint tensor. Shape and slice count values, not bytes, whatever the encoding."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor; another shape in the checkpoint is an error
    slices: tuple[slice, ...]  # one slice with start and stop for each axis
    encodings: frozenset[str] = FLOATS  # how it may be stored; anything else is an error

    @property
    def num_values(self) -> int:
        """Values of the slice."""
        return math.prod(each.stop - each.start for each in self.slices)


class StoredTensor(NamedTuple):
    """What a read gave: floats in their own dtype, or for block encodings uint8 [rows, bytes of a row]."""

    encoding: Encoding
    data: torch.Tensor


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of a matrix lie in a stored tensor that holds more than it, or holds it in another order.

    The matrix consists of units of `unit` rows (heads). Unit i is stored from row `starts[i]` on; in every unit, our
    row j is the stored row `order[j]`.
    """

    num_rows: int  # of the stored tensor
    unit: int
    starts: tuple[int, ...]
    order: tuple[int, ...] | None = None  # None: as stored

    def runs(self, rows: slice) -> list[slice]:
        """The stored rows of our `rows`, as few slices as possible; whole units only where `order` is given."""
        assert self.order is None or not (rows.start % self.unit or rows.stop % self.unit)
        found: list[slice] = []
        for index in range(rows.start // self.unit, -(-rows.stop // self.unit)):
            shift = self.starts[index] - index * self.unit
            first = max(rows.start, index * self.unit) + shift
            last = min(rows.stop, (index + 1) * self.unit) + shift
            if found and found[-1].stop == first:
                found[-1] = slice(found[-1].start, last)
            else:
                found.append(slice(first, last))
        return found


@dataclass(frozen=True, slots=True)
class MatrixPart:
    """One matrix of the checkpoint inside a fused one; parts follow each other along the rows.

    With a placement the stored tensor is another than the matrix: a scheme reads `runs` and passes what it read, in
    whole units, through `arranged`.
    """

    name: str  # without the stored tensors' suffixes: "model.layers.0.self_attn.q_proj"
    shape: tuple[int, int]  # of the stored matrix: (outputs, inputs)
    rows: slice  # this rank's share of the part's rows
    columns: slice
    placement: Placement | None = None

    @property
    def runs(self) -> list[slice]:
        """Stored rows of this rank's share."""
        return [self.rows] if self.placement is None else self.placement.runs(self.rows)

    @property
    def unit(self) -> int:
        """Rows that must be read together."""
        return 1 if self.placement is None or self.placement.order is None else self.placement.unit

    def arranged(self, values: torch.Tensor) -> torch.Tensor:
        """Stored rows [n, ...], n whole units → the same rows in this part's order."""
        if self.placement is None or self.placement.order is None:
            return values
        units = values.view(-1, self.placement.unit, *values.shape[1:])
        return units[:, list(self.placement.order)].reshape(values.shape)

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def num_columns(self) -> int:
        return int(self.columns.stop - self.columns.start)


@dataclass(frozen=True, slots=True)
class Loading:
    """What layers and schemes get while weights are loaded. `read` puts the data on `device`."""

    scheme: QuantScheme
    read: Callable[[TensorRead], StoredTensor]
    device: torch.device
    dtype: torch.dtype

    def vector(self, read: TensorRead) -> torch.Tensor:
        """A tensor of floats in the compute type: norms and biases, which no scheme packs."""
        return self.read(read).data.to(self.device, self.dtype)


class Weight(Protocol):
    """A loaded matrix [rows, columns] on one device."""

    num_bytes: int

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, columns] → [T, rows]."""
        ...

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, columns] → SiLU(first half of the product) · second half, [T, rows / 2]."""
        ...

    def multiply_wide(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] → float32 [T, rows], not rounded to the type of x: logits."""
        ...

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [T] → those rows, [T, columns]: the embedding lookup."""
        ...


class QuantScheme(Protocol):
    """One way to store matrices. Holds no weights itself."""

    name: str
    compute_dtype: str | None  # between the matrices, if nothing else makes sense there; None: the device's choice

    @property
    def description(self) -> str:
        """How matrices are held, for people; complete once they are loaded."""
        ...

    def num_bytes(self, read: TensorRead, encoding: Encoding, dtype_bytes: int) -> int:
        """Memory that the values of a read will take."""
        ...

    def reads(self, part: MatrixPart) -> list[TensorRead]:
        """The stored tensors of a part. Raises UnsupportedModelError for a split that the packing cannot follow."""
        ...

    def load(self, parts: Sequence[MatrixPart], loading: Loading) -> Weight:
        """Reads the parts into one matrix ready to multiply."""
        ...


def make_scheme(name: str) -> QuantScheme:
    """The scheme behind a registry name. Raises UnsupportedModelError for an unknown one."""
    if name not in SCHEMES:
        raise UnsupportedModelError(f"quantization {name!r} is unknown; known: {', '.join(SCHEMES)}")
    module, _, cls = SCHEMES[name].partition(":")
    return getattr(import_module(module), cls)()  # type: ignore[no-any-return]


def make_cpu_scheme(stored_as: QuantScheme) -> QuantScheme:
    """The first form for a CPU that does not decline, else the checkpoint's own scheme."""
    for place in CPU_SCHEMES.values():
        module, _, name = place.partition(":")
        cls = getattr(import_module(module), name)
        if cls.refuse() is None:
            return cls(stored_as)  # type: ignore[no-any-return]
    return stored_as
