"""Builds a model and fills it from a checkpoint: strictly both ways, tensor by tensor, in bounded memory.

Knows no family and no file format: layers say what they read (layers/), sources read it (models/source.py), schemes
decode it (quant/).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch

from tabstop.cache.sizing import check_weights
from tabstop.checkpoint import Checkpoint
from tabstop.config import EngineConfig
from tabstop.device import free_bytes, resolve_device
from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.layers import SINGLE, Loadable, Shard
from tabstop.models import FAMILIES, ProgressCallback
from tabstop.models.config import ModelConfig, read_model_config
from tabstop.models.decoder import Decoder
from tabstop.models.dummy_source import DummySource
from tabstop.models.source import WeightSource, open_source, weights_form
from tabstop.quant import Loading, QuantScheme, StoredTensor, TensorRead, make_cpu_scheme, make_scheme

MAX_NAMES_SHOWN = 5


def build_model(config: ModelConfig, shard: Shard = SINGLE) -> Decoder:
    """The family's layers, without weights. Raises UnsupportedModelError for values that the family does not know."""
    module, _, builder = FAMILIES[config.architecture].partition(":")
    return cast(Decoder, getattr(import_module(module), builder)(config, shard))


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A model without weights beside the open checkpoint that will fill it, already compared."""

    config: ModelConfig
    form: str  # gguf, safetensors or dummy
    model: Decoder
    scheme: QuantScheme
    source: WeightSource
    reads: list[TensorRead]

    @property
    def num_values(self) -> int:
        """Numbers that the loaded model holds on this rank."""
        return sum(read.num_values for read in self.reads)

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Memory that they will take with floats of that size."""
        encodings = {name: info.encoding for name, info in self.source.tensors.items()}
        return sum(self.scheme.num_bytes(read, encodings[read.name], dtype_bytes) for read in self.reads)


def plan_loading(checkpoint: Checkpoint, config: EngineConfig) -> LoadPlan:
    """Everything about loading but the weights: from file headers. Raises as load_model does."""
    model_config = read_model_config(checkpoint, config.max_model_len)
    model = build_model(model_config)
    form = weights_form(checkpoint, config.load_format)
    scheme = make_scheme("dense" if form == "dummy" else model_config.quantization)
    if config.dtype == "auto" and resolve_device(config.device) == "cpu":
        scheme = make_cpu_scheme(scheme)
    reads = [read for layer in loadable_layers(model) for read in layer.reads(scheme)]
    source: WeightSource = (
        DummySource(reads, config.seed, resolve_device(config.device))
        if form == "dummy"
        else open_source(checkpoint, form)
    )
    check_tensors(model, reads, source)
    return LoadPlan(model_config, form, model, scheme, source, reads)


def load_model(
    checkpoint: Checkpoint,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: ProgressCallback | None,
) -> Decoder:
    """The checkpoint's model with its weights on `device`, computing in `dtype`.

    Raises CheckpointError (a missing, unexpected or misshapen tensor by name, a damaged file), UnsupportedModelError,
    ConfigError (--load-format) or MemoryShortageError.
    """
    plan = plan_loading(checkpoint, config)
    weight_bytes = plan.weight_bytes(dtype.itemsize)
    check_weights(weight_bytes, free_bytes(device.type, config.gpu_memory_utilization))
    loading = Loading(plan.scheme, _Reader(plan, device, progress), device, dtype)
    try:
        for layer in loadable_layers(plan.model):
            layer.load(loading)
    except torch.OutOfMemoryError:
        check_weights(weight_bytes, 0)
    plan.model.weight_bytes, plan.model.weights = weight_bytes, plan.scheme.description
    return plan.model


def loadable_layers(model: Decoder) -> list[Loadable]:
    """Every layer with weights of its own, in the order of the forward."""
    return [module for module in model.modules() if isinstance(module, Loadable)]


def check_tensors(model: Decoder, reads: Sequence[TensorRead], source: WeightSource) -> None:
    """Compares names and shapes with the checkpoint's, both ways. Raises CheckpointError naming what differs."""
    expected = {read.name for read in reads}
    missing = [read.name for read in reads if read.name not in source.tensors]
    if missing:
        raise CheckpointError(f"the checkpoint lacks {_listed(missing)}, which its config.json calls for")
    unexpected = [name for name in source.tensors if name not in expected and not model.ignores(name)]
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds {_listed(unexpected)}, which its config.json does not call for; serving without "
            "would give wrong answers"
        )
    for read in reads:
        info = source.tensors[read.name]
        if info.shape != read.shape:
            raise CheckpointError(f"tensor {read.name} has the shape {info.shape}; config.json calls for {read.shape}")
        if info.encoding.name not in read.encodings:
            known = ", ".join(sorted(read.encodings))
            raise UnsupportedModelError(f"tensor {read.name} is stored as {info.encoding.name}; readable here: {known}")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{len(names)} tensor{'s'[: len(names) > 1]}: {', '.join(names[:MAX_NAMES_SHOWN])}{rest}"


class _Reader:
    """Reads for the layers: onto the device, reporting progress in stored bytes."""

    def __init__(self, plan: LoadPlan, device: torch.device, progress: ProgressCallback | None) -> None:
        self.source, self.device, self.progress = plan.source, device, progress
        infos = plan.source.tensors
        self.total = sum(infos[read.name].num_bytes * read.num_values // math.prod(read.shape) for read in plan.reads)
        self.done = 0

    def __call__(self, read: TensorRead) -> StoredTensor:
        stored = self.source.read(read)
        self.done += stored.data.numel() * stored.data.element_size()
        if self.progress:
            self.progress("weights", self.done, self.total)
        return stored._replace(data=stored.data.to(self.device))
