"""Rotary embedding of q and k together with the store of k and v into paged KV memory, from one fused qkv matrix.

KV memory of a layer is [blocks, 2, KV heads, block_size, head_dim]; a slot is block × block_size + offset.
"""

from __future__ import annotations

import torch

from tabstop.kernels.language import ceil_div, early, follow, jit, next_power_of_2, tl

HEADS = 16  # a program: halves of 64 values then give each of 128 threads 8 values, one load of 16 bytes


def rotate_and_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Turns pairs (i, i + dim / 2) of q and k, stores k and v, returns q [T, heads, dim].

    qkv [T, (heads + 2 · KV heads) · dim] · cos, sin [T, 1, dim / 2] (or [T, dim / 2]) of any float type · kv as above,
    written in place · slots int64 [T], below 0 for tokens whose k and v are not kept.
    """
    function = rotate_and_store_triton if qkv.is_cuda else rotate_and_store_torch
    return function(qkv, cos, sin, kv, slots)


def rotate_and_store_torch(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    num_kv_heads, dim = kv.shape[2], kv.shape[4]
    heads = qkv.view(len(qkv), -1, dim)
    num_turned = heads.shape[1] - num_kv_heads
    cos, sin = cos.reshape(-1, 1, dim // 2).float(), sin.reshape(-1, 1, dim // 2).float()
    first, second = heads[:, :num_turned].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    num_heads = num_turned - num_kv_heads
    store_torch(turned[:, num_heads:], heads[:, num_turned:], kv, slots)
    return turned[:, :num_heads].contiguous()


def store(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v [T, KV heads, dim] → their slots, as they are; for models without rotation."""
    function = store_triton if k.is_cuda else store_torch
    function(k, v, kv, slots)


def store_torch(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    """k, v [T, KV heads, dim] → their slots."""
    kept = slots >= 0
    block_size = kv.shape[3]
    blocks, offsets = slots[kept] // block_size, slots[kept] % block_size
    kv[blocks, 0, :, offsets] = k[kept].to(kv.dtype)
    kv[blocks, 1, :, offsets] = v[kept].to(kv.dtype)


def rotate_and_store_triton(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    num_kv_heads, block_size, dim = kv.shape[2:]
    num_heads = qkv.shape[1] // dim - 2 * num_kv_heads
    assert kv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and qkv.stride(1) == 1
    q = qkv.new_empty(len(qkv), num_heads, dim)
    if len(qkv):
        grid = (len(qkv), ceil_div(num_heads + 2 * num_kv_heads, HEADS))
        sizes = (num_heads, num_kv_heads, dim // 2, next_power_of_2(dim // 2), block_size, HEADS)
        _kernel[grid](qkv, cos, sin, q, kv, slots, qkv.stride(0), *sizes, num_warps=4, **early(qkv))
    return q


def store_triton(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> None:
    num_kv_heads, block_size, dim = kv.shape[2:]
    assert kv.is_contiguous() and k.stride()[1:] == v.stride()[1:] == (dim, 1)
    if len(k):
        sizes = (num_kv_heads, dim, next_power_of_2(dim), block_size, 8)
        grid = (len(k), ceil_div(2 * num_kv_heads, 8))
        _store_kernel[grid](k, v, kv, slots, k.stride(0), v.stride(0), *sizes, num_warps=4, **early(k))


@jit()
def _store_kernel(
    k: tl.tensor,
    v: tl.tensor,
    kv: tl.tensor,
    slots: tl.tensor,
    stride_k: tl.tensor,
    stride_v: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program a token and HEADS heads of k, then v."""
    follow(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK_DIM)[None, :]
    slot = tl.load(slots + token)
    kept = (head < 2 * NUM_KV_HEADS) & (column < DIM) & (slot >= 0)
    is_key = head < NUM_KV_HEADS
    keys = tl.load(k + token * stride_k + head * DIM + column, kept & is_key, other=0.0)
    values = tl.load(
        v + token * stride_v + (head - NUM_KV_HEADS) * DIM + column, kept & (head >= NUM_KV_HEADS), other=0.0
    )
    plane = slot // BLOCK_SIZE * (2 * NUM_KV_HEADS) + head
    target = kv + (plane * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM + column
    tl.store(target, tl.where(is_key, keys, values).to(kv.dtype.element_ty), kept)


@jit()
def _kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q: tl.tensor,
    kv: tl.tensor,
    slots: tl.tensor,
    stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program a token and HEADS heads of the matrix: q, then k, then v."""
    follow(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (pair < HALF) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    source = qkv + token * stride + head * (2 * HALF) + pair
    first = tl.load(source, inside, other=0.0)
    second = tl.load(source + HALF, inside, other=0.0)
    c = tl.load(cos + token * HALF + pair, pair < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + pair, pair < HALF, other=0.0).to(tl.float32)
    turned_first = (first.to(tl.float32) * c - second.to(tl.float32) * s).to(first.dtype)
    turned_second = (second.to(tl.float32) * c + first.to(tl.float32) * s).to(first.dtype)
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    first = tl.where(is_value, first, turned_first)
    second = tl.where(is_value, second, turned_second)

    is_query = inside & (head < NUM_HEADS)
    target = q + (token * NUM_HEADS + head) * (2 * HALF) + pair
    tl.store(target, first, is_query)
    tl.store(target + HALF, second, is_query)

    slot = tl.load(slots + token)
    kept = inside & (head >= NUM_HEADS) & (slot >= 0)
    block = slot // BLOCK_SIZE
    # k's heads and then v's are neighbours in the matrix as in a block
    plane = block * (2 * NUM_KV_HEADS) + head - NUM_HEADS
    target = kv + (plane * BLOCK_SIZE + slot % BLOCK_SIZE) * (2 * HALF) + pair
    tl.store(target, first.to(kv.dtype.element_ty), kept)
    tl.store(target + HALF, second.to(kv.dtype.element_ty), kept)
