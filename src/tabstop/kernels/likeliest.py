"""Top-k and top-p on the device, without sorting there and without waiting for it here.

A row's border, the logit of the last token that is kept, is found by quartering the interval of all floats: each time
the row is read once, and what lies above three places in it is counted (k) or weighed (p). Of tokens at the border
the first are kept. The plain version, which sorts, is sampling/likeliest.py:keep_by_sorting.
"""

from __future__ import annotations

import torch

from tabstop.kernels.language import jit, next_power_of_2, tl
from tabstop.kernels.sample import inverse_of, weights_of

CHUNK = 4096  # logits at once


def keep_triton(
    logits: torch.Tensor, rows: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> None:
    """Sets what is not kept of those rows to -inf, in place.

    logits float32 [R, vocab]; rows int64 [N]; temperature (> 0) float32 and top_p float64 [N]; top_k int32 [N], `vocab`
    for no limit.
    """
    vocab = logits.shape[1]
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    if len(rows):
        chunk = min(CHUNK, next_power_of_2(max(vocab, 128)))
        numbers = (temperature, top_k, top_p, logits.stride(0), vocab)
        keep_kernel[(len(rows),)](logits, rows, *numbers, chunk, num_warps=16)


@jit()
def in_order(values: tl.tensor) -> tl.tensor:
    """float32 → int32 in the same order."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit()
def keys_of(row: tl.tensor, first: tl.tensor, vocab: tl.tensor, CHUNK: tl.constexpr) -> tl.tensor:
    """(logits [CHUNK] from `first` on, -inf behind the last; integers in the same order)."""
    place = first + tl.arange(0, CHUNK)
    values = tl.load(row + place, place < vocab, other=-float("inf"))
    values = tl.where(values == 0, 0.0, values)  # there are two zeros
    return values, in_order(values)


@jit()
def measure(
    row: tl.tensor, vocab: tl.tensor, key: tl.tensor, top: tl.tensor, inverse: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """Of tokens above `key` and of those at it: (number above, weight above, number at it, weight at it)."""
    above, equal = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
    heavier, weight = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for first in range(0, vocab, CHUNK):
        values, keys = keys_of(row, first, vocab, CHUNK)
        weights = weights_of(values, top, inverse)
        above += (keys > key).to(tl.int32)
        heavier += tl.where(keys > key, weights, 0.0)
        equal += (keys == key).to(tl.int32)
        weight += tl.where(keys == key, weights, 0.0)
    return tl.sum(above, 0), tl.sum(heavier, 0), tl.sum(equal, 0), tl.sum(weight, 0)


@jit()
def find_border(
    row: tl.tensor,
    vocab: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    wanted: tl.tensor,
    top: tl.tensor,
    inverse: tl.tensor,
    BY_WEIGHT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """The largest key from `low` to below `high`, int64, from which on tokens are `wanted` in number or in weight."""
    while high - low > 1:
        quarter = tl.maximum((high - low) >> 2, 1)
        first_key, second_key = low + quarter, low + 2 * quarter
        third_key = tl.maximum((low + 3 * high) >> 2, second_key)
        # Of places, and summed at the end: every sum across them makes all wait. Numbers are exact up to 2^24.
        first = tl.zeros([CHUNK], tl.float32)
        second = tl.zeros([CHUNK], tl.float32)
        third = tl.zeros([CHUNK], tl.float32)
        for begin in range(0, vocab, CHUNK):
            values, keys = keys_of(row, begin, vocab, CHUNK)
            if BY_WEIGHT:
                amounts = weights_of(values, top, inverse)
            else:
                amounts = tl.where(begin + tl.arange(0, CHUNK) < vocab, 1.0, 0.0)
            first += tl.where(keys >= first_key.to(tl.int32), amounts, 0.0)
            second += tl.where(keys >= second_key.to(tl.int32), amounts, 0.0)
            third += tl.where(keys >= third_key.to(tl.int32), amounts, 0.0)
        low, high = narrow(low, high, first_key, tl.sum(first, 0) >= wanted)
        low, high = narrow(low, high, second_key, tl.sum(second, 0) >= wanted)
        low, high = narrow(low, high, third_key, tl.sum(third, 0) >= wanted)
    return low


@jit()
def narrow(low: tl.tensor, high: tl.tensor, key: tl.tensor, enough: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The part of the interval on the side of `key` where the border is; the interval where it is outside of it."""
    is_inside = (low < key) & (key < high)
    return tl.where(is_inside & enough, key, low), tl.where(is_inside & (enough == 0), key, high)


@jit()
def keep_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """One program a row."""
    index = tl.program_id(0)
    row = logits + tl.load(rows + index) * stride
    inverse, limit, share = inverse_of(tl.load(temperature + index)), tl.load(top_k + index), tl.load(top_p + index)
    highest = tl.full([CHUNK], -1e30, tl.float32)
    for first in range(0, vocab, CHUNK):
        values, _ = keys_of(row, first, vocab, CHUNK)
        highest = tl.maximum(highest, values)
    top = tl.max(highest, 0)
    low, high = tl.full((), -(2**31), tl.int64), in_order(top).to(tl.int64) + 1
    if limit < vocab:
        low = find_border(row, vocab, low, high, limit, top, inverse, False, CHUNK)
    above, heavier, equal, weight = measure(row, vocab, low.to(tl.int32), top, inverse, CHUNK)
    kept = tl.minimum(limit - above, equal)  # of tokens at the border
    if share < 1:
        wanted = share * (heavier + weight * (kept / tl.maximum(equal, 1)))
        by_count = low
        low = find_border(row, vocab, low, high, wanted, top, inverse, True, CHUNK)
        _, heavier, equal, weight = measure(row, vocab, low.to(tl.int32), top, inverse, CHUNK)
        needed = tl.ceil((wanted - heavier) / (weight / tl.maximum(equal, 1))).to(tl.int32)
        kept = tl.maximum(1, tl.minimum(needed, tl.where(low == by_count, kept, equal)))
    border, seen = low.to(tl.int32), 0
    for first in range(0, vocab, CHUNK):
        _, keys = keys_of(row, first, vocab, CHUNK)
        equals = (keys == border).to(tl.int32)
        is_kept = (keys > border) | ((equals > 0) & (seen + tl.cumsum(equals, 0) <= kept))
        place = first + tl.arange(0, CHUNK)
        tl.store(row + place, -float("inf"), (place < vocab) & (is_kept == 0))
        seen += tl.sum(equals, 0)
