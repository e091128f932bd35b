"""A whole step in one call: the layers of a loaded decoder, written down once as a flat list for the CPU's library.

The layers themselves are the twin: they compute the same step one by one, and do so where a layer has no entry here. An
entry counts for its own class only, since a subclass computes something else.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tabstop.attention import AttentionBackend
from tabstop.attention.cpu import CpuAttention, Plan
from tabstop.kernels.cpu.library import Operation, pointer
from tabstop.kernels.cpu.program import Activation, Kind, NormKind, Program, Target, operation
from tabstop.layers import attention as attentions
from tabstop.layers import mlp as mlps
from tabstop.layers import norm as norms
from tabstop.layers.linear import Linear
from tabstop.layers.mlp import ACTIVATIONS
from tabstop.layers.norm import Norm
from tabstop.models import Model, StepContext, blocks, decoder
from tabstop.models.decoder import Block, Decoder
from tabstop.quant.tiles import GROUP, TileWeight

log = logging.getLogger(__name__)

RESIDUAL = 0
"""Buffer of floats 0, which the caller hands over and gets back."""

PLAIN_ACTIVATIONS = {
    ACTIVATIONS["silu"]: Activation.SILU,
    functional.gelu: Activation.GELU,
    ACTIVATIONS["gelu_new"]: Activation.GELU_TANH,
    functional.relu: Activation.RELU,
}


class Declined(Exception):
    """Why a model is computed layer by layer."""


class Writer:
    """Writes operations down, and hands out buffers by name and width: layers share them."""

    def __init__(self, hidden_size: int) -> None:
        self.operations: list[Operation] = []
        self.kept: list[Any] = []
        self.floats: dict[tuple[str, int], int] = {("residual", hidden_size): RESIDUAL}
        self.inputs: dict[tuple[str, int], int] = {}
        self.hidden_size = hidden_size

    def float_buffer(self, name: str, width: int) -> int:
        return self.floats.setdefault((name, width), len(self.floats))

    def input_buffer(self, name: str, width: int) -> int:
        return self.inputs.setdefault((name, width), len(self.inputs))

    def write(self, kind: Kind, target: Target = Target.FLOATS, **fields: Any) -> None:
        self.kept += [value for value in fields.values() if isinstance(value, torch.Tensor)]
        self.operations.append(operation(kind, target, **fields))

    def linear(self, layer: nn.Module, source: int, target: Target, **fields: Any) -> None:
        """A product of the inputs `source`."""
        weight = tiles_of(layer)
        self.write(Kind.LINEAR, target, source=source, matrix=weight.matrix, bias=layer.bias, **fields)

    def norm(self, layer: nn.Module, source: int, target: Target, **fields: Any) -> None:
        """A norm of the floats `source`."""
        bias, kind = None, NormKind.RMS
        match layer:
            case norms.LayerNorm() if type(layer) is norms.LayerNorm:
                weight, bias, kind = layer.weight, layer.bias, NormKind.LAYER
            case norms.RMSNorm() if type(layer) is norms.OffsetRMSNorm:
                assert layer.weight is not None
                weight = 1 + layer.weight
            case norms.RMSNorm() if type(layer) is norms.RMSNorm:
                weight = layer.weight
            case _:
                raise Declined(f"{type(layer).__name__} is unknown to it")
        self.write(Kind.NORM, target, source=source, weight=weight, bias=bias, norm=kind, eps=layer.eps, **fields)

    def normed(self, layer: nn.Module, name: str = "normed") -> int:
        """The norm of the residual stream as inputs."""
        to = self.input_buffer(name, self.hidden_size)
        self.norm(layer, RESIDUAL, Target.INTEGERS, to=to)
        return to


def tiles_of(layer: nn.Module) -> TileWeight:
    """A linear layer's weight. Raises Declined for one that is not in tiles."""
    weight = getattr(layer, "weight", None)
    if type(layer) is not Linear or not isinstance(weight, TileWeight):
        raise Declined(f"{type(layer).__name__} holds {type(weight).__name__}, not tiles")
    return weight


# ---- attention and MLP: inputs `source` → a linear layer's inputs, and that layer


def attend(writer: Writer, layer: attentions.Attention, source: int) -> tuple[int, Linear]:
    if type(layer) not in ATTENTIONS:
        raise Declined(f"{type(layer).__name__} is unknown to it")
    qkv = writer.float_buffer("qkv", tiles_of(layer.qkv).rows)
    writer.linear(layer.qkv, source, Target.FLOATS, to=qkv)
    query_norm = key_norm = None
    eps = 0.0
    if isinstance(layer, attentions.NormedAttention):
        query_norm, key_norm, eps = layer.q_norm.weight, layer.k_norm.weight, layer.q_norm.eps
    writer.write(Kind.STORE, source=qkv, layer=layer.index, query_norm=query_norm, key_norm=key_norm, eps=eps)
    width = layer.num_heads * layer.head_dim
    attended = writer.input_buffer("attended", width)
    fields = {"layer": layer.index, "factor": layer.scale, "window": layer.window or 0}
    if layer.head_dim % GROUP:
        floats = writer.float_buffer("attended", width)
        writer.write(Kind.ATTEND, Target.FLOATS, to=floats, **fields)
        writer.write(Kind.ROUND, source=floats, to=attended)
    else:
        writer.write(Kind.ATTEND, Target.INTEGERS, to=attended, **fields)
    return attended, layer.out


def mlp(writer: Writer, layer: nn.Module, source: int) -> tuple[int, Linear]:
    if isinstance(layer, mlps.PlainMLP):
        if type(layer) is not mlps.PlainMLP or layer.act not in PLAIN_ACTIVATIONS:
            raise Declined("its MLP's activation is unknown")
        up, target, activation = layer.up, Target.INTEGERS, PLAIN_ACTIVATIONS[layer.act]
        size = tiles_of(up).rows
    elif isinstance(layer, mlps.GatedMLP) and type(layer).gated in GATES:
        up, target, activation = layer.gate_up, Target.GATED, GATES[type(layer).gated]
        size = tiles_of(up).rows // 2
    else:
        raise Declined(f"{type(layer).__name__} is unknown to it")
    if size % GROUP:
        raise Declined(f"its MLP has {size} values inside, which is no multiple of {GROUP}")
    inner = writer.input_buffer("inner", size)
    writer.linear(up, source, target, to=inner, activation=activation)
    return inner, layer.down


ATTENTIONS = (
    attentions.Attention,
    attentions.UnturnedAttention,
    attentions.NormedAttention,
    attentions.QueryScalingAttention,
)
GATES: dict[Callable[..., torch.Tensor], Activation] = {
    mlps.GatedMLP.gated: Activation.SILU,
    mlps.GeluGatedMLP.gated: Activation.GELU_TANH,
}
"""By the method that says it: subclasses that only keep their matrices elsewhere inherit it."""

# ---- blocks


def add(writer: Writer, branch: tuple[int, Linear], factor: float = 1.0) -> None:
    """A branch's last product onto the residual stream."""
    source, layer = branch
    writer.linear(layer, source, Target.ADD, to=RESIDUAL, factor=factor)


def add_normed(writer: Writer, branch: tuple[int, Linear], norm: Norm) -> None:
    """The norm of it instead."""
    source, layer = branch
    floats = writer.float_buffer("branch", writer.hidden_size)
    writer.linear(layer, source, Target.FLOATS, to=floats)
    writer.norm(norm, floats, Target.ADD, to=RESIDUAL)


def usual_block(writer: Writer, block: Block) -> None:
    add(writer, attend(writer, block.attention, writer.normed(block.attention_norm)))
    add(writer, mlp(writer, block.mlp, writer.normed(block.mlp_norm)))


def parallel_block(writer: Writer, block: Block) -> None:
    first, second = writer.normed(block.attention_norm), writer.normed(block.mlp_norm, "normed beside")
    add(writer, attend(writer, block.attention, first))
    add(writer, mlp(writer, block.mlp, second))


def shared_norm_block(writer: Writer, block: Block) -> None:
    normed = writer.normed(block.attention_norm)
    add(writer, attend(writer, block.attention, normed))
    add(writer, mlp(writer, block.mlp, normed))


def scaled_block(writer: Writer, block: Block) -> None:
    assert isinstance(block, blocks.ScaledBlock)
    add(writer, attend(writer, block.attention, writer.normed(block.attention_norm)), block.factor)
    add(writer, mlp(writer, block.mlp, writer.normed(block.mlp_norm)), block.factor)


def sandwich_block(writer: Writer, block: Block) -> None:
    assert isinstance(block, blocks.SandwichBlock)
    add_normed(writer, attend(writer, block.attention, writer.normed(block.attention_norm)), block.attention_out_norm)
    add_normed(writer, mlp(writer, block.mlp, writer.normed(block.mlp_norm)), block.mlp_out_norm)


BLOCKS: dict[type[Block], Callable[[Writer, Block], None]] = {
    decoder.Block: usual_block,
    blocks.ParallelBlock: parallel_block,
    blocks.SharedNormBlock: shared_norm_block,
    blocks.ScaledBlock: scaled_block,
    blocks.SandwichBlock: sandwich_block,
}

# ---- models


class CompiledDecoder:
    """A decoder whose blocks and last norm run in one call; satisfies models.Model. Raises Declined."""

    def __init__(self, model: Decoder, attention: CpuAttention) -> None:
        self.model, self.attention = model, attention
        self.vocab_size, self.num_heads = model.vocab_size, model.num_heads
        self.cache_specs = model.cache_specs
        self.weight_bytes, self.weights = model.weight_bytes, model.weights
        if len({(spec.num_kv_heads, spec.head_dim) for spec in model.cache_specs}) > 1:
            raise Declined("its layers have different heads")
        writer = Writer(model.embedding.part.shape[1])
        for block in model.blocks:
            if not isinstance(block, Block) or type(block) not in BLOCKS:
                raise Declined(f"{type(block).__name__} is unknown to it")
            BLOCKS[type(block)](writer, block)
        writer.norm(model.norm, RESIDUAL, Target.FLOATS, to=RESIDUAL)
        widths = [[width for _, width in buffers] for buffers in (writer.floats, writer.inputs)]
        self.program = Program(writer.operations, attention.shape, widths[0], widths[1], writer.kept)
        self.seconds: ctypes.Array[ctypes.c_double] | None = None  # of each operation, when someone measures
        self._angles = Angles(model)
        self._memory: tuple[list[Any], Any] = ([], None)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, context: StepContext) -> torch.Tensor:
        """ids, positions int64 [T] → final hidden states [T, hidden], normed."""
        plan = context.meta
        assert isinstance(plan, Plan)
        x, step = self.model.embed(ids, positions).float().contiguous(), plan.step
        if self._memory[0] is not context.kv:
            self._memory = (context.kv, (ctypes.c_void_p * len(context.kv))(*[kv.data_ptr() for kv in context.kv]))
        self._angles.reach(max(plan.batch.context_lens))
        step.kv, step.x, step.positions = ctypes.addressof(self._memory[1]), x.data_ptr(), positions.data_ptr()
        step.cosines, step.sines = pointer(self._angles.cosines), pointer(self._angles.sines)
        step.query_scales = pointer(self._angles.query_scales)
        if self.seconds is not None:
            step.seconds = self.seconds
        self.program.run(step)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] → float32 [R, vocab_size]."""
        return self.model.logits(hidden)


class Angles:
    """Cosines, sines and query scales of all positions so far, from the model's own layer. Raises Declined."""

    def __init__(self, model: Decoder) -> None:
        self.rope = model.rope
        self.length = 0
        self.cosines: torch.Tensor | None = None  # float32 [length, dim / 2]
        self.sines: torch.Tensor | None = None
        self.query_scales: torch.Tensor | None = None  # float32 [length]
        self.reach(1)
        turns = {type(block.attention) is not attentions.UnturnedAttention for block in model.blocks}
        if turns != {self.cosines is not None}:
            raise Declined("positions enter its layers in different ways")

    def reach(self, length: int) -> None:
        """Makes the tables at least that long."""
        if length <= self.length:
            return
        self.length = max(512, 1 << (length - 1).bit_length())
        with torch.inference_mode():
            rotary = self.rope(torch.arange(self.length), torch.float32)
        if rotary.cos.shape[-1]:
            self.cosines, self.sines = (each.reshape(self.length, -1).contiguous() for each in (rotary.cos, rotary.sin))
        if rotary.query_scale is not None:
            self.query_scales = rotary.query_scale.reshape(-1).contiguous()


def compile_steps(model: Decoder, attention: AttentionBackend) -> tuple[Model, str]:
    """The model with its steps in one call and "one call", or as it is and the reason."""
    if not isinstance(attention, CpuAttention):
        return model, "layer by layer"
    try:
        return CompiledDecoder(model, attention), "one call"
    except Declined as reason:
        log.info("steps are computed layer by layer: %s", reason)
        return model, f"layer by layer ({reason})"
