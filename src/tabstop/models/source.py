"""Where weights come from: the protocol of sources, and the choice among them. Names and shapes are the Hub's.

A source reads slices of named tensors and never a pickle. Which tensors a model needs is the loader's business. This
module knows no torch; the sources behind it do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tabstop.checkpoint import Checkpoint
from tabstop.errors import ConfigError
from tabstop.models import mistral_metadata
from tabstop.models.gguf_metadata import hub_tensors
from tabstop.models.safetensors_header import read_headers
from tabstop.quant import StoredTensor, TensorRead
from tabstop.quant.encodings import TensorInfo


class WeightSource(Protocol):
    """An open checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, read: TensorRead) -> StoredTensor:
        """A slice of a tensor, on the CPU. The slice lies within the tensor's shape: the loader has checked it."""
        ...


def weights_form(checkpoint: Checkpoint, load_format: str) -> str:
    """'gguf', 'safetensors' or 'dummy'. Raises ConfigError when --load-format contradicts the checkpoint."""
    form = "gguf" if checkpoint.gguf else "safetensors"
    if load_format == "dummy":
        return "dummy"
    if load_format not in ("auto", form):
        raise ConfigError(f"--load-format is {load_format!r}, but {checkpoint.name} is a {form} checkpoint; use 'auto'")
    return form


def tensor_infos(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The checkpoint's table of tensors, from file headers alone. Raises CheckpointError."""
    if checkpoint.gguf:
        tensors = hub_tensors(checkpoint.gguf_header)
        return {name: TensorInfo(each.shape, each.encoding, each.num_bytes) for name, each in tensors.items()}
    assert checkpoint.folder is not None
    infos = {name: entry.info for name, entry in read_headers(checkpoint.folder).items()}
    if checkpoint.is_consolidated:
        return {hub: infos[name] for hub, name in mistral_metadata.hub_names(infos).items()}
    return infos


def open_source(checkpoint: Checkpoint, form: str) -> WeightSource:
    """The checkpoint's weights, 'gguf' or 'safetensors'. Raises CheckpointError."""
    if form == "gguf":
        from tabstop.models.gguf_source import GGUFSource

        return GGUFSource(checkpoint.gguf_header)
    if checkpoint.is_consolidated:
        from tabstop.models.consolidated_source import ConsolidatedSource

        return ConsolidatedSource(checkpoint)
    from tabstop.models.safetensors_source import SafetensorsSource

    assert checkpoint.folder is not None
    return SafetensorsSource(checkpoint.folder)
