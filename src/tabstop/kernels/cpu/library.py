"""What is in the C++ library, as ctypes sees it, and the one that this process uses.

Calls release the interpreter lock. Every tensor passed must be contiguous and live until the call returns.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from ctypes import POINTER, c_bool, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from tabstop.config import cache_folder
from tabstop.device import num_cores
from tabstop.kernels.cpu.build import INSTALL_HINT, CannotBuild, Progress, build, compiler

log = logging.getLogger(__name__)


class Matrix(ctypes.Structure):
    """matrix.h's Matrix."""

    _fields_ = (
        ("tiles", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("has_minima", c_int32),
        ("has_halves", c_int32),
    )


class KVShape(ctypes.Structure):
    """attention.h's KVShape."""

    _fields_ = (("num_heads", c_int32), ("num_kv_heads", c_int32), ("dim", c_int32), ("block_size", c_int32))


class Operation(ctypes.Structure):
    """step.h's Operation."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "target", "activation", "norm", "layer", "window", "source", "to")),
        ("eps", c_float),
        ("factor", c_float),
        ("matrix", POINTER(Matrix)),
        *((name, c_void_p) for name in ("weight", "bias", "query_norm", "key_norm")),
    )


class Step(ctypes.Structure):
    """step.h's Step."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_rows", "table_stride")),
        *((name, c_void_p) for name in ("positions", "kv_slots", "query_starts", "contexts", "tables")),
        *((name, c_void_p) for name in ("cosines", "sines", "query_scales", "kv", "x")),
        ("num_threads", c_int32),
        ("seconds", POINTER(c_double)),
    )


SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "tabstop_machine": (c_char_p, ()),
    "tabstop_pack": (
        None,
        (POINTER(Matrix), c_void_p, c_void_p, c_int32, c_int64, POINTER(c_int64), c_int32),
    ),
    "tabstop_multiply": (c_bool, (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p, c_int32)),
    "tabstop_multiply_gated": (c_bool, (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p, c_int32)),
    "tabstop_gather": (None, (POINTER(Matrix), c_void_p, c_int64, c_void_p)),
    "tabstop_program": (
        c_void_p,
        (POINTER(Operation), c_int32, POINTER(KVShape), POINTER(c_int64), POINTER(c_int32)),
    ),
    "tabstop_run": (c_bool, (c_void_p, POINTER(Step))),
    "tabstop_free": (None, (c_void_p,)),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a compiled library and declares its functions. Raises CannotBuild where the system forbids it."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotBuild(f"{error}; set XDG_CACHE_HOME to a folder whose files may be executed") from None
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


class _Chosen:
    """The library of this process, or why there is none; decided once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.library: ctypes.CDLL | None = None
        self.reason: str | None = None


_chosen = _Chosen()


def library(progress: Progress | None = None) -> ctypes.CDLL | None:
    """The library, compiled at the first call on this machine. None where that fails; it has then been logged why."""
    with _chosen.lock:
        if _chosen.library is None and _chosen.reason is None:
            try:
                _chosen.library = open_library(build(cache_folder() / "kernels", progress))
            except (CannotBuild, OSError) as error:
                _chosen.reason = str(error)
                log.warning("the CPU's fast kernels are not used: %s; serving goes on with PyTorch's", error)
    return _chosen.library


def refuse() -> str | None:
    """Why there is no library and will be none; None where there is one or it can be tried. Compiles nothing."""
    if _chosen.library is not None:
        return None
    return _chosen.reason or (None if compiler() else f"there is no C++ compiler: {INSTALL_HINT}")


def machine() -> str:
    """What the library was compiled for, for people."""
    loaded = library()
    assert loaded is not None
    return str(loaded.tabstop_machine().decode())


class Threads:
    """How many threads a call may use. Results do not depend on it."""

    count = num_cores()


def pointer(tensor: torch.Tensor | None) -> int | None:
    """A tensor's address for a call."""
    return None if tensor is None else tensor.data_ptr()
