"""RMSNorm (Zhang and Sennrich, 2019), alone or behind the addition of a layer's output to the residual stream."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from tabstop.kernels.language import early, follow, jit, next_power_of_2, tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size] / rms(x) · weight [size] → as x; a GPU rounds what is normed to the type before the product."""
    if x.is_cuda:
        return rms_norm_triton(x, weight, eps)
    if x.dtype is torch.float32:
        return functional.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_cpu(x, weight, eps)


def rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Of narrow types, in few operators (PyTorch's own norm is a dozen); best with a weight in float32."""
    wide = x.float()
    root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).mul_(x.shape[-1] ** -0.5)
    return wide.div_(torch.hypot(root, root_of(eps))).mul_(weight).to(x.dtype)


@functools.cache
def root_of(eps: float) -> torch.Tensor:
    return torch.tensor(eps**0.5)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), all [..., size]; the sum is rounded to its type before it is normed."""
    if x.is_cuda:
        return add_rms_norm_triton(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, (x, normed, x), weight, eps)
    return normed


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.is_contiguous() and residual.is_contiguous()
    normed, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, (residual, normed, total), weight, eps)
    return normed, total


def _launch(
    x: torch.Tensor, others: tuple[torch.Tensor, torch.Tensor, torch.Tensor], weight: torch.Tensor, eps: float
) -> None:
    """others: residual, normed and total; the residual is x itself when there is none."""
    residual, normed, total = others
    size = x.shape[-1]
    group, stride = _row_groups(x)
    assert weight.is_contiguous()
    block = next_power_of_2(size)
    num_warps = min(max(block // 512, 1), 16)  # 16 values a thread: two loads of 16 bytes
    _kernel[(x.numel() // size,)](
        *(x, residual, weight, normed, total, eps, stride, size, block, group, residual is not x),
        num_warps=num_warps,
        **early(x),
    )


def _row_groups(x: torch.Tensor) -> tuple[int, int]:
    """(rows that lie side by side, values from one such group to the next): some heads of each token are a group."""
    if x.is_contiguous():
        return 1, x.shape[-1]
    assert x.dim() == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2], "heads lie side by side"
    return x.shape[1], x.stride(0)


@jit()
def _kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    eps: tl.tensor,
    stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program a row."""
    follow(EARLY)
    places = tl.arange(0, BLOCK)
    inside = places < SIZE
    number = tl.program_id(0).to(tl.int64)
    row = number * SIZE + places
    values = tl.load(x + number // GROUP * stride + number % GROUP * SIZE + places, inside, other=0.0)
    if ADDS:
        added = values.to(tl.float32) + tl.load(residual + row, inside, other=0.0).to(tl.float32)
        values = added.to(values.dtype)
        tl.store(total + row, values, inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    rounded = (wide * scale).to(values.dtype).to(tl.float32)
    scaled = rounded * tl.load(weight + places, inside, other=0.0).to(tl.float32)
    tl.store(normed + row, scaled.to(values.dtype), inside)
