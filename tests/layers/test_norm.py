"""The CPU's norm of narrow types against its twin in float64."""

from __future__ import annotations

import pytest
import torch

from tabstop.kernels.norm import add_rms_norm, rms_norm


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 576), (16, 100), (5, 7, 48)])
def test_narrow_types_are_rounded_once(shape: tuple[int, ...], dtype: torch.dtype, eps: float) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator).to(dtype)
    x[0] *= 1e-3  # where eps counts
    weight = torch.rand(shape[-1], generator=generator)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    bound = 1.01 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), expected, rtol=bound, atol=1e-7)
    branch = torch.randn(shape, generator=generator).to(dtype)
    normed, total = add_rms_norm(branch, x, weight.to(dtype), eps)
    assert torch.equal(total, branch + x) and torch.equal(normed, rms_norm(total, weight.to(dtype), eps))
    assert normed.dtype == dtype
