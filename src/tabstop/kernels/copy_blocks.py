"""Copies the first tokens of blocks to other blocks, in all layers, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tabstop.kernels.language import jit, next_power_of_2, tl

Copy = tuple[int, int, int]
"""(source block, target block, tokens)"""


def copy_blocks(kv: Sequence[torch.Tensor], copies: Sequence[Copy]) -> None:
    """kv: each layer's memory [blocks, 2, KV heads, block_size, dim], all of one shape. No source is also a target."""
    if not copies:
        return
    if not kv[0].is_cuda:
        return copy_blocks_torch(kv, copies)
    device = kv[0].device
    addresses = torch.tensor([layer.data_ptr() for layer in kv], dtype=torch.int64)
    copy_blocks_triton(
        kv[0],
        addresses.to(device, non_blocking=True),
        torch.tensor(copies, dtype=torch.int32).to(device, non_blocking=True),
    )


def copy_blocks_torch(kv: Sequence[torch.Tensor], copies: Sequence[Copy]) -> None:
    for layer in kv:
        for source, target, num_tokens in copies:
            layer[target, :, :, :num_tokens] = layer[source, :, :, :num_tokens]


def copy_blocks_triton(like: torch.Tensor, addresses: torch.Tensor, copies: torch.Tensor) -> None:
    """like: any layer · addresses int64 [layers], of each layer's memory · copies int32 [n, 3]; 0 tokens: nothing."""
    num_planes, block_size, dim = 2 * like.shape[2], like.shape[3], like.shape[4]
    words = like.element_size() * dim
    assert words % 4 == 0, "heads are copied as 32-bit words"
    size = block_size * words // 4
    grid = (len(copies), len(addresses), num_planes)
    _kernel[grid](addresses, copies, words // 4, size, next_power_of_2(size), num_warps=4)


@jit()
def _kernel(
    addresses: tl.tensor, copies: tl.tensor, TOKEN: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Program (copy, layer, keys or values of a head); a token has TOKEN words, a head's part of a block SIZE."""
    copy, plane = tl.program_id(0), tl.program_id(2)
    source = tl.load(copies + 3 * copy).to(tl.int64)
    target = tl.load(copies + 3 * copy + 1).to(tl.int64)
    end = tl.load(copies + 3 * copy + 2) * TOKEN
    memory = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    word = tl.arange(0, BLOCK)
    num_planes = tl.num_programs(2)
    values = tl.load(memory + (source * num_planes + plane) * SIZE + word, word < end)
    tl.store(memory + (target * num_planes + plane) * SIZE + word, values, word < end)
