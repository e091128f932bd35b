"""Weights in a GGUF file, under the Hub's names and with the Hub's order of rows; blocks stay packed."""

from __future__ import annotations

from functools import lru_cache

import torch

from tabstop.errors import UnsupportedModelError
from tabstop.models.file_reader import read_rows
from tabstop.models.gguf_header import GGUFHeader, GGUFTensor
from tabstop.models.gguf_metadata import RowOrder, hub_tensors, row_order, value_offset
from tabstop.quant import StoredTensor, TensorRead
from tabstop.quant.encodings import FLOATS, TensorInfo


class GGUFSource:
    """Reads what is asked for, when it is asked for."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        self._tensors = hub_tensors(header)
        self.tensors = {
            name: TensorInfo(tensor.shape, tensor.encoding, tensor.num_bytes) for name, tensor in self._tensors.items()
        }

    def read(self, read: TensorRead) -> StoredTensor:
        """A slice of a tensor. Where the file has another order of rows, those around the slice are read."""
        tensor, info = self._tensors[read.name], self.tensors[read.name]
        order, rows = row_order(self._header, read.name), read.slices[0]
        if order is None:
            stored = read_rows(self._header.path, tensor.offset, info, rows)
        else:
            places = hub_row_order(tensor.shape[0], order)[rows]
            first, last = int(places.min()), int(places.max()) + 1
            stored = read_rows(self._header.path, tensor.offset, info, slice(first, last))[places - first]
        if len(read.slices) == 2:
            stored = stored[:, self._column_slice(read, tensor)]
        offset = value_offset(self._header, read.name)
        return StoredTensor(tensor.encoding, stored - offset if offset else stored)

    def _column_slice(self, read: TensorRead, tensor: GGUFTensor) -> slice:
        """A slice of values → of stored elements (bytes for block encodings)."""
        columns, encoding = read.slices[1], tensor.encoding
        if encoding.name in FLOATS:
            return columns
        if columns.start % encoding.block_values or columns.stop % encoding.block_values:
            raise UnsupportedModelError(
                f"columns {columns.start} to {columns.stop} of {read.name} do not fall on {encoding.name} blocks of "
                f"{encoding.block_values} values; use fewer ranks"
            )
        return slice(encoding.num_bytes(columns.start), encoding.num_bytes(columns.stop))


@lru_cache(maxsize=8)
def hub_row_order(num_rows: int, order: RowOrder) -> torch.Tensor:
    """For each row in the Hub's order the row of the file: int64 [num_rows]."""
    rows = torch.arange(num_rows, device="cpu")
    if order.kind == "pairs":
        return rows.view(order.num_heads, num_rows // order.num_heads // 2, 2).transpose(1, 2).reshape(-1)
    return rows.view(3, order.num_heads, -1).transpose(0, 1).reshape(-1)
