"""A flat list of operations that the library runs in one call, and how to write one down.

Buffers of floats and of 8-bit inputs are known by number; buffer 0 of floats is the caller's `x`. Knows no layers: who
writes a program is models/compiled.py (whole steps) and attention/cpu.py (attention alone).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from tabstop.kernels.cpu.library import KVShape, Matrix, Operation, Step, library, pointer


class Kind(IntEnum):
    """What an operation does."""

    NORM = 0  # floats → floats or inputs
    LINEAR = 1  # inputs → floats or inputs
    STORE = 2  # q, k and v in one row of floats → turned queries (kept inside) and the layer's memory
    ATTEND = 3  # the queries and the layer's memory → floats or inputs
    ROUND = 4  # floats → inputs


class Target(IntEnum):
    """What becomes of a result."""

    FLOATS = 0
    ADD = 1  # times `factor`, to what is there
    INTEGERS = 2
    GATED = 3  # activation(first half) · second half, as integers


class Activation(IntEnum):
    """Between two products."""

    NONE = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    RELU = 4


class NormKind(IntEnum):
    """How a row is normed."""

    RMS = 0
    LAYER = 1


def operation(kind: Kind, target: Target = Target.FLOATS, **fields: Any) -> Operation:
    """One operation; other fields as library.Operation names them, tensors for pointers."""
    result = Operation(kind=kind, target=target, factor=1.0)
    for name, value in fields.items():
        if isinstance(value, Matrix):
            value = ctypes.pointer(value)
        setattr(result, name, pointer(value) if value is None or isinstance(value, torch.Tensor) else value)
    return result


class Program:
    """Operations with their buffers. `keep`: what must live as long, since the library only has its address."""

    def __init__(
        self,
        operations: Sequence[Operation],
        shape: KVShape,
        float_widths: Sequence[int],
        input_widths: Sequence[int],
        keep: Any = None,
    ) -> None:
        loaded = library()
        assert loaded is not None
        self._library, self.operations, self._keep = loaded, list(operations), keep
        array = (Operation * len(operations))(*operations)
        widths = (ctypes.c_int64 * (len(float_widths) + len(input_widths)))(*float_widths, *input_widths)
        counts = (ctypes.c_int32 * 2)(len(float_widths), len(input_widths))
        self._address = loaded.tabstop_program(array, len(operations), shape, widths, counts)
        if not self._address:
            raise MemoryError("no memory for the list of operations")

    def run(self, step: Step) -> None:
        """One step; its x is changed in place. Raises MemoryError."""
        if not self._library.tabstop_run(self._address, step):
            raise MemoryError(f"no memory for a step of {step.num_tokens} tokens")

    def __del__(self) -> None:
        if address := getattr(self, "_address", None):
            self._library.tabstop_free(address)
