"""A few rows times a matrix: x W^T, bound by reading W once. Plain with a bias, or gate and up with SiLU·mul behind.

A program owns whole rows of W and its threads lie along their columns, so what is read of x serves all of them; the
order of the sums depends on nothing but the launch. The next tile is requested before the last is used. Small programs,
several on a multiprocessor at once, keep the memory busy and even out the last wave. Started early (language.early), a
program asks for its first weights before it waits for x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tabstop.kernels.language import ceil_div, early, jit, next_power_of_2, tl

MAX_ROWS = 8  # of x: more are a matter of matrix units
MAX_COLUMNS = 2048  # of all rows of x at a time: 64 sums a thread, at most 130 registers
MAX_LOOPED = 1024  # columns at a time when there are more: two tiles of weights are in flight then, 8 KB each
MIN_BLOCK = 256  # columns: 16 bytes for each thread of a warp

ONE_ROW_BLOCKS = (2048, 1024, 512)  # columns at a time


@dataclass(frozen=True, slots=True)
class Launch:
    """How a product is cut: rows of W a program, columns at a time, warps."""

    rows: int
    block: int
    warps: int


def plan_gemv(num_rows: int, columns: int, gated: bool = False) -> Launch:
    """num_rows of x, 1 to 8 → a launch, for one row as measured on an H200 (benchmarks/RESULTS.md).

    One row: the widest block that divides the columns, so that no tile is partly empty; narrow blocks go with few rows
    and threads a program. More rows: as many columns at a time as a thread's registers allow.
    """
    if num_rows == 1:
        exact = next((block for block in ONE_ROW_BLOCKS if columns % block == 0), ONE_ROW_BLOCKS[0])
        size = 2 if exact == ONE_ROW_BLOCKS[-1] else 4
        return Launch(rows=size, block=max(MIN_BLOCK, min(exact, next_power_of_2(columns))), warps=size)
    size = 8 if gated else 4
    widest = MAX_COLUMNS if columns <= MAX_COLUMNS else MAX_LOOPED
    block = min(MAX_COLUMNS // next_power_of_2(num_rows), widest, next_power_of_2(columns))
    return Launch(rows=size, block=max(MIN_BLOCK, block), warps=size)


def gemv_torch(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = functional.linear(x.float(), matrix.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def gated_gemv_torch(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = functional.linear(x.float(), matrix.float(), None if bias is None else bias.float())
    gate, up = wide.chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(x.dtype)


def gemv_triton(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, launch: Launch | None = None
) -> torch.Tensor:
    """x [T, columns], T at most 8, times matrix [rows, columns] → [T, rows]; float32 inside, rounded once."""
    result = x.new_empty(len(x), len(matrix))
    return _launch((x, matrix, bias), result, launch or plan_gemv(len(x), x.shape[1]), gated=False)


def wide_gemv_triton(x: torch.Tensor, matrix: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    """As gemv_triton, without rounding: the result is float32."""
    result = x.new_empty(len(x), len(matrix), dtype=torch.float32)
    return _launch((x, matrix, None), result, launch or plan_gemv(len(x), x.shape[1]), gated=False)


def gated_gemv_triton(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, launch: Launch | None = None
) -> torch.Tensor:
    """SiLU(gate) · up [T, rows / 2] of gate and up = x W^T, gate's rows first; float32 inside, rounded once."""
    result = x.new_empty(len(x), len(matrix) // 2)
    return _launch((x, matrix, bias), result, launch or plan_gemv(len(x), x.shape[1], gated=True), gated=True)


def _launch(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], result: torch.Tensor, launch: Launch, *, gated: bool
) -> torch.Tensor:
    x, matrix, bias = inputs
    assert 1 <= len(x) <= MAX_ROWS and x.is_contiguous() and matrix.is_contiguous()
    size = result.shape[1]
    _kernel[(ceil_div(len(matrix), launch.rows),)](
        x, matrix, matrix if bias is None else bias, result,
        len(x), size, x.shape[1], launch.rows, launch.block, bias is not None, gated,
        num_warps=launch.warps, num_stages=1, **early(x),
    )  # fmt: skip
    return result


@jit()
def _kernel(
    x: tl.tensor,
    matrix: tl.tensor,
    bias: tl.tensor,
    result: tl.tensor,
    NUM_ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program computes some outputs of every row of x: ROWS of them, of a gated matrix ROWS / 2.

    SIZE: outputs. In a gated tile gate and up take turns, so that both of an output lie side by side.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    HALVES: tl.constexpr = 2 if GATED else 1
    places = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * (ROWS // HALVES) + places // HALVES
    rows = tl.where(outputs < SIZE, outputs + places % HALVES * SIZE, 0)
    columns = tl.arange(0, BLOCK)[None, :]
    starts = matrix + rows.to(tl.int64)[:, None] * COLUMNS
    weights = tl.load(starts + columns, columns < COLUMNS, other=0.0, eviction_policy="evict_first")
    if EARLY:
        tl.extra.cuda.gdc_wait()
    sums = (tl.zeros([ROWS, BLOCK], tl.float32),) * NUM_ROWS
    tile_of_x = x + tl.zeros([ROWS, 1], tl.int32)  # laid out as the weights, or x passes through shared memory
    for start in range(0, COLUMNS, BLOCK):
        ahead = start + BLOCK + columns
        following = weights
        if COLUMNS > BLOCK:
            following = tl.load(starts + ahead, ahead < COLUMNS, other=0.0, eviction_policy="evict_first")
        now = start + columns
        sums = _add_products(sums, weights.to(tl.float32), tile_of_x + now, now < COLUMNS, COLUMNS)
        weights = following
    for row in tl.static_range(NUM_ROWS):
        total = tl.sum(sums[row], 1)
        if ADDS:
            total += tl.load(bias + rows).to(tl.float32)
        _store(result + row * SIZE, total, outputs, SIZE, ROWS, GATED)


@jit()
def _add_products(
    sums: tl.tuple, weights: tl.tensor, x: tl.tensor, inside: tl.tensor, COLUMNS: tl.constexpr
) -> tl.tuple:
    """sums[t] + weights · row t of x, for each t."""
    added = (sums[0] + weights * tl.load(x, inside, other=0.0).to(tl.float32),)
    for row in tl.static_range(1, len(sums)):
        values = tl.load(x + row * COLUMNS, inside, other=0.0).to(tl.float32)
        added += (sums[row] + weights * values,)  # type: ignore[assignment]
    return added


@jit()
def _store(
    result: tl.tensor,
    total: tl.tensor,
    outputs: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
) -> None:
    """One row's outputs."""
    if GATED:
        gate, up = tl.split(tl.reshape(total, [ROWS // 2, 2]))
        product = gate / (1.0 + tl.exp(-gate)) * up
        places = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        tl.store(result + places, product.to(result.dtype.element_ty), places < SIZE)
    else:
        tl.store(result + outputs, total.to(result.dtype.element_ty), outputs < SIZE)
