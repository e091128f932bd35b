"""Weights in Mistral's own form, under the Hub's names and with the Hub's order of rows."""

from __future__ import annotations

from tabstop.checkpoint import Checkpoint
from tabstop.models import mistral_metadata
from tabstop.models.gguf_metadata import RowOrder
from tabstop.models.gguf_source import hub_row_order
from tabstop.models.safetensors_source import SafetensorsSource
from tabstop.quant import StoredTensor, TensorRead


class ConsolidatedSource:
    """consolidated.safetensors or its parts. Rows of q and k lie in rotary pairs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.folder is not None
        self._files = SafetensorsSource(checkpoint.folder)
        self._names = mistral_metadata.hub_names(self._files.tensors)
        self._heads = {
            ".q_proj.": checkpoint.config["num_attention_heads"],
            ".k_proj.": checkpoint.config.get("num_key_value_heads", checkpoint.config["num_attention_heads"]),
        }
        self.tensors = {hub: self._files.tensors[name] for hub, name in self._names.items()}

    def read(self, read: TensorRead) -> StoredTensor:
        """A slice of a tensor; of q and k the stored rows around it are read, and put in order."""
        stored = read._replace(name=self._names[read.name])
        num_heads = next((count for part, count in self._heads.items() if part in read.name), None)
        if num_heads is None:
            return self._files.read(stored)
        rows = hub_row_order(read.shape[0], RowOrder("pairs", num_heads))[read.slices[0]]
        first, last = int(rows.min()), int(rows.max()) + 1
        found = self._files.read(stored._replace(slices=(slice(first, last), *read.slices[1:])))
        return found._replace(data=found.data[rows - first])
