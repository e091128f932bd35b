"""Float matrices: whichever kernel multiplies, the product is the same."""

from __future__ import annotations

import pytest
import torch

from tabstop.kernels.gemv import gated_gemv_torch, gemv_torch
from tabstop.quant.dense import DenseWeight, prefers_gemv
from tests.kernels.rows import DEVICE, TOLERANCE


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 8, 17])
@pytest.mark.parametrize("columns", [96, 100])
def test_products_of_any_number_of_rows(num_rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    values = [torch.randn(*shape, generator=generator) for shape in ((num_rows, columns), (14, columns), (14,))]
    x, matrix, bias = (each.to(DEVICE, torch.bfloat16) for each in values)
    weight, tolerance = DenseWeight(matrix / columns**0.5), TOLERANCE[torch.bfloat16]
    product, gated = weight.multiply(x, bias), weight.multiply_gated(x, None)
    torch.testing.assert_close(product, gemv_torch(x, weight.matrix, bias), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gated, gated_gemv_torch(x, weight.matrix, None), rtol=tolerance, atol=tolerance)


def test_the_processor_multiplies_by_the_library() -> None:
    assert not prefers_gemv(torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16))
