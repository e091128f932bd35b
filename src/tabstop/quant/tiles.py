"""Tiles of small integers for the CPU's byte products: the blocks of a GGUF file, or floats rounded to 8 bits.

A tile is 16 rows by 32 columns in one of three widths (4, 5 or 8 bits), with a float16 scale and, if blocks have one, a
minimum for each row (kernels/cpu/matrix.h has the layout). Inputs are rounded to 8 bits with a scale for every 32
values. `unpacked` and `multiply_torch` are the twins of what the library computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tabstop.kernels.cpu.library import Matrix, Threads, library, machine, pointer, refuse
from tabstop.kernels.cpu.memory import Arena
from tabstop.quant import Loading, MatrixPart, QuantScheme, StoredTensor, TensorRead
from tabstop.quant.dense import stored_windows
from tabstop.quant.encodings import Encoding

ROWS, GROUP = 16, 32

ENCODINGS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""In the order of pack.h's enum."""


class Format(NamedTuple):
    """A matrix has one."""

    bits: int
    has_minima: bool

    @property
    def tile_bytes(self) -> int:
        return self.bits * 64 + 32 + 32 * self.has_minima

    @property
    def name(self) -> str:
        return f"u{self.bits}"


EXACT = {
    "Q4_0": Format(4, False),
    "Q4_1": Format(4, True),
    "Q4_K": Format(4, True),
    "Q5_0": Format(5, False),
    "Q5_1": Format(5, True),
    "Q5_K": Format(5, True),
    "Q8_0": Format(8, False),
}
"""Encodings whose integers are kept. All others are rounded to 8 bits."""

ROUNDED = Format(8, False)


def format_of(encodings: Sequence[str]) -> Format:
    """The smallest format that holds a matrix whose parts are stored in these."""
    formats = [EXACT.get(encoding, ROUNDED) for encoding in encodings]
    return Format(max(each.bits for each in formats), any(each.has_minima for each in formats))


class TileWeight:
    """A matrix [rows, columns] in tiles. x is float32, and so is what comes back."""

    def __init__(self, shape: tuple[int, int], form: Format, memory: Arena, has_halves: bool = False) -> None:
        """has_halves: whether two halves of the rows are read together, and so lie side by side (matrix.h)."""
        self.rows, self.columns = shape
        self.form, self.has_halves = form, has_halves and self.rows % (4 * ROWS) == 0
        rows, columns = shape
        num_tiles = -(-rows // ROWS) * -(-columns // GROUP)
        self.num_bytes = num_tiles * form.tile_bytes
        self.tiles = memory.take(self.num_bytes)
        self.matrix = Matrix(self.tiles.data_ptr(), rows, columns, form.bits, form.has_minima, self.has_halves)
        loaded = library()
        assert loaded is not None, "TileScheme declines without a library"
        self.library: ctypes.CDLL = loaded

    def fill(self, first_row: int, stored: StoredTensor) -> None:
        """Packs stored rows as rows from `first_row` on."""
        encoding, data = stored.encoding, stored.data.contiguous()
        if encoding.name == "F64":
            encoding, data = encoding._replace(name="F32"), data.float()
        row_bytes = data.shape[1] * data.element_size()
        rows = (ctypes.c_int64 * 2)(first_row, len(data))
        number = ENCODINGS.index(encoding.name)
        arguments = (self.matrix, self.tiles.data_ptr(), data.data_ptr(), number, row_bytes, rows)
        self.library.tabstop_pack(*arguments, Threads.count)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._call(self.library.tabstop_multiply, x, bias, self.rows)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.rows % (2 * GROUP):
            gate, up = self.multiply(x, bias).chunk(2, dim=-1)
            return torch.nn.functional.silu(gate) * up
        return self._call(self.library.tabstop_multiply_gated, x, bias, self.rows // 2)

    def multiply_wide(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x.float(), None)

    def _call(self, function: object, x: torch.Tensor, bias: torch.Tensor | None, width: int) -> torch.Tensor:
        assert callable(function) and x.dtype == torch.float32 and x.shape[-1] == self.columns
        x = x.contiguous()
        result = torch.empty(len(x), width)
        if not function(self.matrix, x.data_ptr(), len(x), pointer(bias), result.data_ptr(), Threads.count):
            raise MemoryError(f"no memory for {len(x)} rows of inputs")
        return result

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.contiguous()
        result = torch.empty(len(ids), self.columns)
        self.library.tabstop_gather(self.matrix, ids.data_ptr(), len(ids), result.data_ptr())
        return result


class TileScheme:
    """Reads what the checkpoint's own scheme reads, keeps tiles."""

    name = "tiles"
    compute_dtype: str | None = None

    def __init__(self, stored_as: QuantScheme) -> None:
        self.stored_as = stored_as
        self.used: set[str] = set()
        self.memory = Arena()

    @staticmethod
    def refuse() -> str | None:
        return refuse()

    @property
    def description(self) -> str:
        return f"{' '.join(sorted(self.used))} tiles ({machine()})"

    def reads(self, part: MatrixPart) -> list[TensorRead]:
        return self.stored_as.reads(part)

    def num_bytes(self, read: TensorRead, encoding: Encoding, dtype_bytes: int) -> int:
        """Matrices; vectors stay floats."""
        if len(read.shape) < 2:
            return read.num_values * dtype_bytes
        return read.num_values * format_of([encoding.name]).tile_bytes // (ROWS * GROUP)

    def load(self, parts: Sequence[MatrixPart], loading: Loading) -> TileWeight:
        # Whole tiles at a time, so that threads share none.
        windows = [stored_windows(part, self.reads(part), loading, multiple=ROWS) for part in parts]
        firsts = [next(each) for each in windows]
        form = format_of([first.encoding.name for first in firsts])
        counts = [part.num_rows for part in parts]
        shape, has_halves = (sum(counts), parts[0].num_columns), len(counts) == 2 and counts[0] == counts[1]
        weight = TileWeight(shape, form, self.memory, has_halves)
        self.used.add(form.name)
        filled = 0
        for first, rest in zip(firsts, windows, strict=True):
            for stored in (first, *rest):
                weight.fill(filled, stored)
                filled += len(stored.data)
        return weight


def unpacked(weight: TileWeight) -> torch.Tensor:
    """The matrix that the tiles stand for, float32 [rows, columns]."""
    bits, has_minima = weight.form
    row_tiles, groups = -(-weight.rows // ROWS), -(-weight.columns // GROUP)
    tiles = weight.tiles.view(row_tiles, groups, weight.form.tile_bytes)
    if weight.has_halves:
        tiles = tiles.view(-1, 2, 2, *tiles.shape[1:]).transpose(0, 1).reshape(tiles.shape)
    if bits == 8:
        vectors = tiles[..., :512].reshape(row_tiles, groups, 8, ROWS, 4)
    else:
        packed = tiles[..., :256].reshape(row_tiles, groups, 4, ROWS, 4)
        vectors = torch.cat((packed & 15, packed >> 4), dim=2)
    if bits == 5:
        fifth = tiles[..., 256:320].reshape(row_tiles, groups, 64, 1) >> torch.arange(8, dtype=torch.uint8) & 1
        vectors = vectors | fifth.reshape(row_tiles, groups, 8, ROWS, 4) << 4
    values = vectors.permute(0, 3, 1, 2, 4).reshape(row_tiles, ROWS, groups, GROUP).float()
    factors = tiles[..., bits * 64 :].contiguous().view(torch.float16).float()  # scales, then minima
    scales = factors[..., :ROWS].transpose(1, 2)[..., None]
    result = values * scales + factors[..., ROWS:].transpose(1, 2)[..., None] if has_minima else None
    if result is None:
        result = (values - (1 << bits - 1)) * scales
    return result.reshape(row_tiles * ROWS, groups * GROUP)[: weight.rows, : weight.columns]


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """x [T, columns] as integers of 8 bits times a scale for every 32 values, as float32 again."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    most = padded.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # 127 / most would round twice
    integers = torch.round(padded * torch.where(most > 0, inverse, 0))
    return (integers * (most / 127)).view(len(x), -1)[:, : x.shape[1]]


def multiply_torch(weight: TileWeight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The twin of TileWeight.multiply, in float64."""
    result = rounded_inputs(x).double() @ unpacked(weight).double().T
    return (result if bias is None else result + bias.double()).float()
