"""Weights in safetensors files, read by slice."""

from __future__ import annotations

from pathlib import Path

from tabstop.models.file_reader import read_bytes, read_rows, typed
from tabstop.models.safetensors_header import read_headers
from tabstop.quant import StoredTensor, TensorRead


class SafetensorsSource:
    """A checkpoint folder, sharded or not."""

    def __init__(self, folder: Path) -> None:
        self._entries = read_headers(folder)
        self.tensors = {name: entry.info for name, entry in self._entries.items()}

    def read(self, read: TensorRead) -> StoredTensor:
        """A slice of a tensor."""
        entry = self._entries[read.name]
        if not read.slices:  # a single number
            data = typed(read_bytes(entry.path, entry.offset, entry.info.num_bytes), entry.info.encoding, ())
        else:
            data = read_rows(entry.path, entry.offset, entry.info, read.slices[0])[(slice(None), *read.slices[1:])]
        return StoredTensor(entry.info.encoding, data)
