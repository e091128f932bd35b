"""Weights in safetensors files, read by slice through memory maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tabstop.errors import CheckpointError
from tabstop.models.safetensors_header import read_headers
from tabstop.quant import StoredTensor, TensorRead


class SafetensorsSource:
    """A checkpoint folder, sharded or not."""

    def __init__(self, folder: Path) -> None:
        self._entries = read_headers(folder)
        self.tensors = {name: entry.info for name, entry in self._entries.items()}
        self._files: dict[Path, Any] = {}

    def read(self, read: TensorRead) -> StoredTensor:
        """A slice of a tensor, copied out of the map."""
        path = self._entries[read.name].path
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            data = self._files[path].get_slice(read.name)[read.slices]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {read.name} from {path}: {error}") from None
        return StoredTensor(self.tensors[read.name].encoding, data)
