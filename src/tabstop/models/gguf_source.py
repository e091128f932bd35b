"""Weights in a GGUF file, under the Hub's names and with the Hub's order of rows; blocks stay packed."""

from __future__ import annotations

from functools import lru_cache

import torch

from tabstop.errors import UnsupportedModelError
from tabstop.models.gguf_header import GGUFHeader, GGUFTensor
from tabstop.models.gguf_metadata import RowOrder, hub_tensors, row_order, value_offset
from tabstop.quant import StoredTensor, TensorRead
from tabstop.quant.encodings import TensorInfo

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFSource:
    """The whole file, mapped; pages are read when touched."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        self._tensors = hub_tensors(header)
        self.tensors = {
            name: TensorInfo(tensor.shape, tensor.encoding, tensor.num_bytes) for name, tensor in self._tensors.items()
        }
        file_bytes = header.path.stat().st_size
        # private: the map is ours to write to, as torch demands, and the file is never changed
        self._bytes = torch.from_file(str(header.path), shared=False, size=file_bytes, dtype=torch.uint8)

    def read(self, read: TensorRead) -> StoredTensor:
        """A slice of a tensor: a view of the map, or a copy when its rows are reordered."""
        tensor = self._tensors[read.name]
        stored = self._rows(tensor)
        order = row_order(self._header, read.name)
        if order is None:
            stored = stored[read.slices[0]]
        else:
            stored = stored[hub_row_order(tensor.shape[0], order)[read.slices[0]]]
        if len(read.slices) == 2:
            stored = stored[:, self._column_slice(read, tensor)]
        offset = value_offset(self._header, read.name)
        return StoredTensor(tensor.encoding, stored - offset if offset else stored)

    def _rows(self, tensor: GGUFTensor) -> torch.Tensor:
        """The tensor as floats of its shape, or as uint8 [rows, bytes of a row]."""
        stored = self._bytes[tensor.offset : tensor.offset + tensor.num_bytes]
        if tensor.encoding.name in FLOAT_TYPES:
            return stored.view(FLOAT_TYPES[tensor.encoding.name]).view(tensor.shape)
        return stored.view(*tensor.shape[:-1], -1)

    def _column_slice(self, read: TensorRead, tensor: GGUFTensor) -> slice:
        """A slice of values → of stored elements (bytes for block encodings)."""
        columns, encoding = read.slices[1], tensor.encoding
        if encoding.name in FLOAT_TYPES:
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
    rows = torch.arange(num_rows)
    if order.kind == "pairs":
        return rows.view(order.num_heads, num_rows // order.num_heads // 2, 2).transpose(1, 2).reshape(-1)
    return rows.view(3, order.num_heads, -1).transpose(0, 1).reshape(-1)
