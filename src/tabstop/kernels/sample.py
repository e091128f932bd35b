"""Draws tokens on the device, without waiting for it: the likeliest, or by the inverse of the cumulative distribution.

The random number of each row is given (sampling/random.py), so a draw is reproducible and equal, up to rounding at the
borders between tokens, to the plain sampler's. Rows with top-k or top-p need their logits cut before.
"""

from __future__ import annotations

import torch

from tabstop.kernels.language import ceil_div, jit, next_power_of_2, tl

CHUNK = 4096  # logits a program
BLOCK = 512  # logits whose weights are added before any is looked at
BELOW_ONE = 1 - 2**-24


def draw(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """logits float32 [N, vocab], temperature (0: the likeliest) and uniform in [0, 1) float32 [N] → int64 [N].

    Forbidden tokens have logits of -inf; each row must have another. Of equal logits the first is the likeliest. A row
    that holds no distribution (NaN) draws any token, but one of the vocabulary: a table will be indexed with it.
    """
    function = draw_triton if logits.is_cuda else draw_blocks
    return function(logits, temperature, uniform)


def draw_torch(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    scale = torch.where(temperature > 0, temperature, 1).double()[:, None]
    cumulative = (logits.double() / scale).softmax(-1).cumsum(-1)
    drawn = _passed(cumulative, uniform.double()[:, None] * cumulative[:, -1:])
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def draw_blocks(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The same with weights rounded to float32: sums of blocks, then the tokens of one block. A fifth of the time."""
    num_rows, vocab = logits.shape
    num_blocks = ceil_div(vocab, BLOCK)
    weights = logits.new_zeros(num_rows, num_blocks, BLOCK)
    values = weights.flatten(1)[:, :vocab]
    torch.sub(logits, logits.amax(-1, keepdim=True), out=values)
    values.div_(torch.where(temperature > 0, temperature, 1)[:, None]).exp_()
    sums = weights.sum(-1).double()
    cumulative = sums.cumsum(-1)
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    block = _passed(cumulative, threshold)
    within = weights[torch.arange(num_rows), block].double().cumsum(-1)
    before = (cumulative - sums).gather(1, block[:, None])
    drawn = block * BLOCK + _passed(within, (threshold - before).clamp_(min=0))
    return torch.where(temperature > 0, drawn.clamp_(max=vocab - 1), logits.argmax(-1))


def _passed(cumulative: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Where cumulative sums [N, n] pass a threshold [N, 1], int64 [N]."""
    total = cumulative[:, -1:]
    threshold = threshold.minimum(total.nextafter(torch.zeros_like(total)))  # rounding must not pass the last token
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=cumulative.shape[1] - 1)


def draw_triton(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    num_rows, vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    num_chunks = ceil_div(vocab, CHUNK)
    tops, sums = logits.new_empty(2, num_rows, num_chunks)
    places = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    tokens = logits.new_empty(num_rows, dtype=torch.int64)
    if num_rows:
        stride = logits.stride(0)
        scan_kernel[(num_rows, num_chunks)](logits, temperature, tops, sums, places, stride, vocab, CHUNK, num_warps=4)
        draw_kernel[(num_rows,)](
            *(logits, temperature, uniform, tops, sums, places, tokens, stride, vocab, num_chunks),
            *(CHUNK, next_power_of_2(num_chunks), BELOW_ONE),
            num_warps=8,
        )
    return tokens


@jit()
def inverse_of(temperature: tl.tensor) -> tl.tensor:
    """What logits are multiplied by; 1 for greedy rows."""
    return tl.where(temperature > 0, 1.0 / tl.where(temperature > 0, temperature, 1.0), 1.0)


@jit()
def weights_of(values: tl.tensor, top: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """exp((logit - the largest) / temperature); 0 for forbidden tokens."""
    return tl.where(values > -1e30, tl.exp((tl.maximum(values, -1e30) - top) * inverse), 0.0)


@jit()
def scan_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    places: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Program (row, chunk): the chunk's highest logit, where it is, and the sum of exponentials below it."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row.to(tl.int64) * stride + place, place < vocab, other=-float("inf"))
    values = tl.maximum(values, -1e30)
    top = tl.max(values, 0)
    target = row * tl.num_programs(1) + chunk
    tl.store(tops + target, top)
    tl.store(places + target, chunk * CHUNK + tl.argmax(values, 0))
    exponents = (values - top) * inverse_of(tl.load(temperature + row))
    tl.store(sums + target, tl.sum(tl.where(values > -1e30, tl.exp(exponents), 0.0), 0))


@jit("num_chunks")
def draw_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    uniform: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    places: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    num_chunks: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BELOW_ONE: tl.constexpr,
) -> None:
    """One program a row: the chunk that the random number falls into, then the token in it."""
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK_CHUNKS)
    inside = index < num_chunks
    chunk_tops = tl.load(tops + row * num_chunks + index, inside, other=-1e30)
    highest = tl.max(chunk_tops, 0)
    degrees = tl.load(temperature + row)
    inverse = inverse_of(degrees)
    if degrees <= 0:
        best = tl.argmax(chunk_tops, 0)
        tl.store(tokens + row, tl.load(places + row * num_chunks + best).to(tl.int64))
        return
    weights = tl.load(sums + row * num_chunks + index, inside, other=0.0) * tl.exp((chunk_tops - highest) * inverse)
    threshold = tl.minimum(tl.load(uniform + row), BELOW_ONE) * tl.sum(weights, 0)
    chunk = tl.sum((tl.cumsum(weights, 0) <= threshold).to(tl.int32), 0)
    chunk = tl.minimum(chunk, tl.max(tl.where(weights > 0, index, 0), 0))
    before = tl.sum(tl.where(index < chunk, weights, 0.0), 0)

    place = tl.arange(0, CHUNK)
    read = chunk * CHUNK + place < vocab
    values = tl.load(logits + row.to(tl.int64) * stride + chunk * CHUNK + place, read, other=-float("inf"))
    weights = weights_of(values, highest, inverse)
    token = tl.sum((before + tl.cumsum(weights, 0) <= threshold).to(tl.int32), 0)
    token = tl.minimum(token, tl.max(tl.where(weights > 0, place, 0), 0))
    tl.store(tokens + row, (chunk * CHUNK + token).to(tl.int64))
