"""The fused small operations against their twins, on poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from tabstop.kernels import activation, copy_blocks, feed, norm, rope_store
from tests.kernels.rows import DEVICE, TOLERANCE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (3, 100), (2, 1536), (1, 5120)])
def test_rms_norm(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    x, residual, weight = (
        randn(num_tokens, size, dtype=dtype),
        randn(num_tokens, size, dtype=dtype),
        randn(size, dtype=dtype),
    )
    close(norm.rms_norm_triton(x, weight, 1e-5), norm.rms_norm_torch(x, weight, 1e-5))
    normed, total = norm.add_rms_norm_triton(x, residual * 3, weight, 1e-5)
    expected_normed, expected_total = norm.add_rms_norm_torch(x, residual * 3, weight, 1e-5)
    close(normed, expected_normed)
    close(total, expected_total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [slice(0, 3), slice(3, 4), slice(2, 7)])
def test_rms_norm_of_some_heads_of_each_token(dtype: torch.dtype, heads: slice) -> None:
    x, weight = randn(5, 7, 48, dtype=dtype)[:, heads], randn(48, dtype=dtype)
    close(norm.rms_norm_triton(x, weight, 1e-5), norm.rms_norm_torch(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 100), (2, 1024), (2, 1500)])
def test_silu_and_multiply(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    gate_up = randn(num_tokens, 2 * size, dtype=dtype) * 4
    close(activation.silu_and_multiply_triton(gate_up), activation.silu_and_multiply_torch(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (7, 1, 80), (28, 4, 16), (2, 1, 256)])
def test_rotation_and_store(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    qkv = randn(5, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = randn(5, 1, dim // 2) * 9
    slots = torch.tensor([3, 17, -1, 0, 11], device=DEVICE)
    kv = torch.full((6, 2, kv_heads, 4, dim), torch.nan, dtype=dtype, device=DEVICE)
    expected_kv = kv.clone()
    q = rope_store.rotate_and_store_triton(qkv, angles.cos(), angles.sin(), kv, slots)
    expected = rope_store.rotate_and_store_torch(qkv, angles.cos(), angles.sin(), expected_kv, slots)
    close(q, expected)
    close(kv, expected_kv)
    assert int(kv.isnan().logical_not().sum()) == 4 * 2 * kv_heads * dim


def test_rotation_with_angles_in_the_compute_type() -> None:
    qkv, angles = randn(2, 3 * 16, dtype=torch.bfloat16), randn(2, 8)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    kv = torch.zeros(1, 2, 1, 4, 16, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.tensor([1, 0], device=DEVICE)
    expected = rope_store.rotate_and_store_torch(qkv, cos, sin, kv.clone(), slots)
    close(rope_store.rotate_and_store_triton(qkv, cos, sin, kv, slots), expected)


def test_store_of_views() -> None:
    qkv = randn(5, 9, 24)
    k, v = qkv[:, 3:6], qkv[:, 6:]
    kv = torch.full((4, 2, 3, 4, 24), torch.nan, device=DEVICE)
    expected = kv.clone()
    slots = torch.tensor([15, 0, 7, -1, 6], device=DEVICE)
    rope_store.store_triton(k, v, kv, slots)
    rope_store.store_torch(k, v, expected, slots)
    close(kv, expected)
    assert torch.equal(kv[3, 1, :, 3], v[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_blocks_in_all_layers(dtype: torch.dtype) -> None:
    layers = [randn(6, 2, 3, 5, 10 + 2 * index, dtype=dtype)[..., :10].contiguous() for index in range(3)]
    expected = [layer.clone() for layer in layers]
    copies = [(0, 4, 5), (0, 2, 3), (1, 5, 1), (3, 1, 0)]
    copy_blocks.copy_blocks_torch(expected, copies)
    addresses = torch.tensor([layer.data_ptr() for layer in layers], device=DEVICE)
    copy_blocks.copy_blocks_triton(layers[0], addresses, torch.tensor(copies, dtype=torch.int32, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(layers, expected, strict=True))
    assert torch.equal(expected[0][2, :, :, :3], layers[0][0, :, :, :3])


@pytest.mark.parametrize("num_ids", [1, 7, 1500])
def test_ids_that_only_slots_know(num_ids: int) -> None:
    last_ids = torch.arange(100, 109, device=DEVICE)
    ids = (torch.arange(num_ids, device=DEVICE) * 7 % 23) - 9  # -9 to 13
    assert torch.equal(feed.known_ids_triton(ids, last_ids), feed.known_ids_torch(ids, last_ids))
    assert feed.known_ids_torch(torch.tensor([-1, 5, -9]), last_ids.cpu()).tolist() == [100, 5, 108]
