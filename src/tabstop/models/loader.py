"""Builds a model and fills it from a checkpoint: strictly both ways, tensor by tensor, in bounded memory.

Knows no family and no file format: layers say what they read (layers/), sources read it (models/source.py), schemes
decode it (quant/).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import cast

import torch

from tabstop.checkpoint import Checkpoint
from tabstop.config import EngineConfig
from tabstop.errors import CheckpointError, MemoryShortageError
from tabstop.layers import SINGLE, Loadable, Shard
from tabstop.models import FAMILIES, Model, ProgressCallback
from tabstop.models.config import ModelConfig, read_model_config
from tabstop.models.decoder import Decoder
from tabstop.models.dummy_source import DummySource
from tabstop.models.source import WeightSource, open_source, weights_form
from tabstop.quant import Loading, QuantScheme, StoredTensor, TensorRead, make_scheme

MAX_NAMES_SHOWN = 5


def build_model(config: ModelConfig, shard: Shard = SINGLE) -> Decoder:
    """The family's layers, without weights. Raises UnsupportedModelError for values that the family does not know."""
    module, _, builder = FAMILIES[config.architecture].partition(":")
    return cast(Decoder, getattr(import_module(module), builder)(config, shard))


def load_model(
    checkpoint: Checkpoint,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: ProgressCallback | None,
) -> Model:
    """The checkpoint's model with its weights on `device`, computing in `dtype`.

    Raises CheckpointError (a missing, unexpected or misshapen tensor by name, a damaged file), UnsupportedModelError,
    ConfigError (--load-format) or MemoryShortageError.
    """
    model_config = read_model_config(checkpoint)
    model = build_model(model_config)
    form = weights_form(checkpoint, config.load_format)
    scheme = make_scheme("dense" if form == "dummy" else model_config.quantization)
    reads = model_reads(model, scheme)
    source: WeightSource = DummySource(reads, config.seed) if form == "dummy" else open_source(checkpoint, form)
    check_tensors(model, reads, source)
    try:
        fill(model, scheme, _Reader(source, reads, device, progress), dtype)
    except torch.OutOfMemoryError:
        raise MemoryShortageError(
            f"the weights of {checkpoint.name} do not fit on {device}; use a smaller or more strongly quantized model"
        ) from None
    return model


def loadable_layers(model: Decoder) -> list[Loadable]:
    """Every layer with weights of its own, in the order of the forward."""
    return [module for module in model.modules() if isinstance(module, Loadable)]


def model_reads(model: Decoder, scheme: QuantScheme) -> list[TensorRead]:
    """All tensors that the model will read."""
    return [read for layer in loadable_layers(model) for read in layer.reads(scheme)]


def check_tensors(model: Decoder, reads: Iterable[TensorRead], source: WeightSource) -> None:
    """Compares names and shapes with the checkpoint's, both ways. Raises CheckpointError naming what differs."""
    expected = {read.name: read.shape for read in reads}
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_listed(missing)}, which its config.json calls for")
    unexpected = [name for name in source.tensors if name not in expected and not model.ignores(name)]
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds {_listed(unexpected)}, which its config.json does not call for; serving without "
            "would give wrong answers"
        )
    for name, shape in expected.items():
        if source.tensors[name].shape != shape:
            raise CheckpointError(
                f"tensor {name} has the shape {source.tensors[name].shape}; config.json calls for {shape}"
            )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{len(names)} tensor{'s'[: len(names) > 1]}: {', '.join(names[:MAX_NAMES_SHOWN])}{rest}"


class _Reader:
    """Reads for the layers: onto the device, reporting progress in stored bytes."""

    def __init__(
        self, source: WeightSource, reads: Iterable[TensorRead], device: torch.device, progress: ProgressCallback | None
    ) -> None:
        self.source, self.device, self.progress = source, device, progress
        self.total = sum(source.tensors[name].num_bytes for name in {read.name for read in reads})
        self.done = 0

    def __call__(self, read: TensorRead) -> StoredTensor:
        stored = self.source.read(read)
        self.done += stored.data.numel() * stored.data.element_size()
        if self.progress:
            self.progress("weights", self.done, self.total)
        return stored._replace(data=stored.data.to(self.device))


def fill(model: Decoder, scheme: QuantScheme, reader: _Reader, dtype: torch.dtype) -> None:
    """Loads every layer in turn; the peak is the model plus one window of one tensor."""
    loading = Loading(scheme, reader, reader.device, dtype)
    for layer in loadable_layers(model):
        layer.load(loading)
