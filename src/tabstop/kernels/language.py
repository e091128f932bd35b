"""Triton where it is installed, and stand-ins that let kernels be defined, but not launched, where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

__all__ = ["ceil_div", "early", "follow", "jit", "next_power_of_2", "rehearsal", "tl", "triton", "why_unavailable"]

try:
    import triton
    import triton.language as tl
except ImportError:  # an installation for the CPU
    triton = None
    tl = None

_is_rehearsal: ContextVar[bool] = ContextVar("rehearsal", default=False)


def jit(*counts: str) -> Callable[[Callable[..., Any]], Any]:
    """Declares a kernel or a part of one; `counts` are integer parameters whose values must not cause a recompilation.

    A new kernel for each value divisible by 16, or equal to 1, is what Triton makes of an integer otherwise.
    """

    def declare(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        if triton.knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=list(counts))
        return _kernel_class()(function, do_not_specialize=list(counts))

    return declare


@cache
def _kernel_class() -> type:
    class Kernel(triton.JITFunction):  # type: ignore[misc]
        """Is only compiled where it is launched in a rehearsal."""

        def run(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return super().run(*arguments, grid=grid, warmup=warmup or _is_rehearsal.get(), **options)

    return Kernel


@contextmanager
def rehearsal(num_threads: int) -> Iterator[None]:
    """Kernels that are launched in it are compiled, side by side, and not run: what they would write is arbitrary.

    Compiling one takes a core 0.1 to 0.6 s, most of it outside of Python, and what launches it, C of its own for every
    signature, another 0.2. Errors are left to the launch that needs it.
    """
    from triton.runtime import _async_compile, driver

    token = _is_rehearsal.set(True)
    try:
        with ThreadPoolExecutor(num_threads) as threads:
            with _async_compile.AsyncCompileMode(threads, ignore_errors=True) as mode:
                yield
            compiled = [each.kernel for each in mode.future_kernels.values() if each.kernel is not None]
            launcher = getattr(driver.active, "launcher_cls", None)  # keeps what it compiles on the disk
            if launcher is not None:
                list(threads.map(lambda kernel: launcher(kernel.src, kernel.metadata), compiled))
    finally:
        _async_compile.active_mode.set(None)  # an error on its way out leaves it
        _is_rehearsal.reset(token)


@jit()
def follow(EARLY: tl.constexpr) -> None:
    """The first statement of a kernel that is launched with `early`: before it nothing may be read or written.

    Lets the kernel behind start as soon as there is room, then waits until the one before has written everything.
    Every kernel of such a chain waits, so whoever waits for its neighbour has waited for all.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def early(tensor: Any) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before still runs (programmatic dependent launch).

    On cards from Hopper on: what a launch costs hides behind the kernel before. Safe beside kernels without it.
    """
    starts_early = tensor.is_cuda and _knows_early_launches(tensor.device.index)
    return {"EARLY": starts_early} | ({"launch_pdl": True} if starts_early else {})


@cache
def _knows_early_launches(device: int) -> bool:
    import torch

    return torch.cuda.get_device_capability(device) >= (9, 0)


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
