"""Triton where it is installed, and stand-ins that let kernels be defined, but not launched, where it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["ceil_div", "jit", "next_power_of_2", "tl", "triton", "why_unavailable"]

try:
    import triton
    import triton.language as tl
except ImportError:  # an installation for the CPU
    triton = None
    tl = None


def jit(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """Declares a kernel or a part of one; `counts` are integer parameters whose values must not cause a recompilation.

    A new kernel for each value divisible by 16, or equal to 1, is what Triton makes of an integer otherwise.
    """

    def declare(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(counts)) if triton is not None else function

    return declare


def why_unavailable(dtypes: Sequence[Any]) -> str | None:
    """None when kernels can run on these types of values, else the reason."""
    import torch

    if triton is None:
        return "Triton is not installed"
    unknown = set(dtypes) - {torch.bfloat16, torch.float16, torch.float32}
    return f"no kernels for {', '.join(map(str, unknown))}" if unknown else None


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()
