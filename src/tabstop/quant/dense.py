"""Plain float matrices in the compute type: the scheme of unquantized checkpoints, and the twin of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

from tabstop.kernels.activation import silu_and_multiply
from tabstop.kernels.gemv import gated_gemv_triton, gemv_triton, wide_gemv_triton
from tabstop.kernels.language import triton
from tabstop.quant import Loading, MatrixPart, StoredTensor, TensorRead
from tabstop.quant.encodings import Encoding

WINDOW_VALUES = 1 << 20
"""Matrices are converted in windows of about that many values: no second copy of a large one, and temporaries stay in
the processor's cache (windows of 32 million took three to thirty times as long)."""


GEMV_ROWS = (1,)
"""Numbers of rows for which our own kernel multiplies. One row is bound by reading the matrix, and the library reads
small ones at half the card's rate; from two rows on it is the faster one (benchmarks/RESULTS.md)."""


def prefers_gemv(x: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether x [T, columns] meets the matrix in kernels/gemv.py; everything else is the library's."""
    return (
        x.is_cuda
        and triton is not None
        and x.dim() == 2
        and len(x) in GEMV_ROWS
        and x.dtype == matrix.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
        and matrix.is_contiguous()
        and x.shape[1] % 8 == 0  # rows begin at multiples of 16 bytes, or loads are narrow
    )


class DenseWeight:
    """A float matrix [rows, columns]."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.num_bytes = matrix.numel() * matrix.element_size()

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if prefers_gemv(x, self.matrix):
            return gemv_triton(x, self.matrix, bias)
        return functional.linear(x, self.matrix, bias)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if prefers_gemv(x, self.matrix):
            return gated_gemv_triton(x, self.matrix, bias)
        return silu_and_multiply(functional.linear(x, self.matrix, bias))

    def multiply_wide(self, x: torch.Tensor) -> torch.Tensor:
        if prefers_gemv(x, self.matrix):
            return wide_gemv_triton(x, self.matrix)
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(x, self.matrix.t(), out_dtype=torch.float32)
        return functional.linear(x, self.matrix).float()

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix.index_select(0, ids)


class DenseScheme:
    """One tensor `<part>.weight` of floats for each part."""

    name = "dense"
    compute_dtype: str | None = None
    description = "dense"

    def num_bytes(self, read: TensorRead, encoding: Encoding, dtype_bytes: int) -> int:
        return read.num_values * dtype_bytes

    def reads(self, part: MatrixPart) -> list[TensorRead]:
        return weight_reads(part)

    def load(self, parts: Sequence[MatrixPart], loading: Loading) -> DenseWeight:
        return load_dense(parts, loading, stored_values)


def weight_reads(part: MatrixPart) -> list[TensorRead]:
    """The slices of the one tensor of a part that is stored as floats."""
    return [TensorRead(f"{part.name}.weight", part.shape, (run, part.columns)) for run in part.runs]


def stored_windows(
    part: MatrixPart, reads: Sequence[TensorRead], loading: Loading, multiple: int = 1
) -> Iterator[StoredTensor]:
    """The part's rows in its order, a window at a time: whole units, or else a multiple of `multiple` rows.

    `reads`: the part's, each of whole rows.
    """
    unit = part.unit if part.unit > 1 else multiple
    step = max(unit, WINDOW_VALUES // part.num_columns // unit * unit)
    for read in reads:
        run = read.slices[0]
        for first in range(run.start, run.stop, step):
            rows = slice(first, min(first + step, run.stop))
            stored = loading.read(read._replace(slices=(rows, part.columns)))
            yield stored._replace(data=part.arranged(stored.data))


def stored_values(stored: StoredTensor) -> torch.Tensor:
    """Floats need no decoding."""
    return stored.data


def load_dense(
    parts: Sequence[MatrixPart], loading: Loading, decode: Callable[[StoredTensor], torch.Tensor]
) -> DenseWeight:
    """Reads the parts window by window, decodes them to floats and stacks them in the compute type."""
    num_rows, num_columns = sum(part.num_rows for part in parts), parts[0].num_columns
    matrix = torch.empty(num_rows, num_columns, device=loading.device, dtype=loading.dtype)
    filled = 0
    for part in parts:
        for stored in stored_windows(part, weight_reads(part), loading):
            values = decode(stored)
            matrix[filled : filled + len(values)] = values
            filled += len(values)
    return DenseWeight(matrix)
