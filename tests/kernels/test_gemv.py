"""Matrix times a few rows against its twin: odd sizes, every number of rows, poisoned neighbours."""

from __future__ import annotations

import pytest
import torch

from tabstop.kernels import gemv
from tests.kernels.rows import DEVICE, TOLERANCE

DTYPES = [torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def inputs(num_rows: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, a matrix between rows of NaN, and a bias."""
    memory = torch.full((rows + 2, columns), torch.nan, dtype=dtype, device=DEVICE)
    memory[1:-1] = randn(rows, columns, dtype=dtype) / columns**0.5
    return randn(num_rows, columns, dtype=dtype), memory[1:-1], randn(rows, dtype=dtype)


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype and result.shape == expected.shape
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "rows", "columns"),
    [
        (1, 9, 2048),
        (1, 3, 1344),
        (2, 7, 100),
        (3, 1, 1000),
        (4, 6, 515),
        (5, 5, 300),
        (6, 4, 256),
        (7, 2, 33),
        (8, 5, 7),
    ],
)
def test_product(dtype: torch.dtype, num_rows: int, rows: int, columns: int) -> None:
    x, matrix, bias = inputs(num_rows, rows, columns, dtype)
    close(gemv.gemv_triton(x, matrix, None), gemv.gemv_torch(x, matrix, None))
    close(gemv.gemv_triton(x, matrix, bias), gemv.gemv_torch(x, matrix, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "rows", "columns"), [(1, 10, 1344), (1, 2, 3), (2, 18, 2048), (5, 14, 300), (8, 6, 77)]
)
def test_gated_product(dtype: torch.dtype, num_rows: int, rows: int, columns: int) -> None:
    x, matrix, bias = inputs(num_rows, rows, columns, dtype)
    close(gemv.gated_gemv_triton(x * 3, matrix, None), gemv.gated_gemv_torch(x * 3, matrix, None))
    close(gemv.gated_gemv_triton(x, matrix, bias), gemv.gated_gemv_torch(x, matrix, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_not_rounded(dtype: torch.dtype) -> None:
    x, matrix, _ = inputs(1, 9, 700, dtype)
    logits = gemv.wide_gemv_triton(x, matrix)
    torch.testing.assert_close(logits, x.float() @ matrix.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("launch", [gemv.Launch(2, 512, 1), gemv.Launch(16, 256, 4), gemv.Launch(8, 128, 8)])
def test_every_launch_gives_the_product(launch: gemv.Launch) -> None:
    x, matrix, bias = inputs(2, 22, 700, torch.float16)
    close(gemv.gemv_triton(x, matrix, bias, launch), gemv.gemv_torch(x, matrix, bias))
    close(gemv.gated_gemv_triton(x, matrix, bias, launch), gemv.gated_gemv_torch(x, matrix, bias))


@pytest.mark.parametrize("num_rows", range(1, 9))
def test_a_plan_keeps_sums_in_registers_and_loads_wide(num_rows: int) -> None:
    for columns in (64, 2048, 5504, 18944):
        for gated in (False, True):
            launch = gemv.plan_gemv(num_rows, columns, gated)
            assert launch.block * num_rows <= gemv.MAX_COLUMNS
            assert launch.rows * launch.block // launch.warps >= gemv.MIN_BLOCK
