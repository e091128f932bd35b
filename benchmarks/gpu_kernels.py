"""Measures the kernels on one card, one JSON line a measurement.

`PYTHONPATH=.:src python benchmarks/gpu_kernels.py [section ...]`, from the root of the repository.

Every kernel is first compared with its twin on poisoned outputs and on KV memory in which everything that must not be
read is NaN. Times are medians over replays of a CUDA graph that holds many launches on changing inputs, together more
than the second-level cache holds. A section that fails or takes too long is reported and skipped. `--rehearse` runs
tiny shapes once, without a card, under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from tabstop.kernels import activation, copy_blocks, gemv, language, likeliest, norm, rope_store, sample
from tabstop.kernels.attention import Launch, Rows, View, attend_torch
from tabstop.kernels.decode import DecodePlan, decode_triton, plan_decode
from tabstop.kernels.language import jit, tl, triton
from tabstop.kernels.prompt import PromptPlan, find_tiles, plan_prompt, prompt_triton
from tests.kernels.rows import TOLERANCE, Shape, make_rows

REHEARSES = "--rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSES else "cuda")
DTYPE = torch.float16 if REHEARSES else torch.bfloat16
CACHE_BYTES = 1 << 16 if REHEARSES else 220 << 20
SECTION_SECONDS = 70
Heads = tuple[int, int, int]
"""(query heads, KV heads, dim)"""

MHA, GQA, SMALL = (40, 40, 128), (28, 4, 128), (16, 16, 128)
START = time.perf_counter()


def emit(section: str, **values: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
    print(json.dumps({"section": section, **rounded, "at": round(time.perf_counter() - START, 1)}), flush=True)


def seconds(calls: Sequence[Callable[[], Any]], num_launches: int = 20, num_replays: int = 7) -> float:
    """Median time of one call; all of them in turn, in one graph."""
    for call in calls[:2]:
        call()
    if REHEARSES:
        return 1.0
    torch.cuda.synchronize()
    order = [calls[index % len(calls)] for index in range(max(num_launches, len(calls)))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in order:
            call()
    times = []
    for _ in range(num_replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(order))
    del graph
    return statistics.median(times[1:])


def copies(num_bytes: int) -> int:
    """Enough of one call's inputs that none is left in the cache when its turn comes again."""
    return max(1, min(64, -(-CACHE_BYTES // num_bytes)))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(DTYPE)


# Bandwidth ------------------------------------------------------------------------------------------------------------


@jit()
def read_kernel(source: tl.tensor, target: tl.tensor, rounds: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Program p reads `rounds` blocks and keeps one sum."""
    place = tl.program_id(0).to(tl.int64) * rounds * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.range(0, rounds, num_stages=3):
        total += tl.load(source + place + step * BLOCK, eviction_policy="evict_first")
    tl.store(target + tl.program_id(0), tl.sum(total, 0))


def bandwidth() -> None:
    gigabytes = 1 << (16 if REHEARSES else 32)
    source = torch.ones(gigabytes // 4, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    for block, warps, rounds in ((4096, 4, 16), (8192, 8, 16), (4096, 4, 64)) if not REHEARSES else ((1024, 4, 4),):
        programs = len(source) // block // rounds

        def read(block: int = block, warps: int = warps, rounds: int = rounds, programs: int = programs) -> None:
            read_kernel[(programs,)](source, target, rounds, block, num_warps=warps)

        elapsed = seconds([read], 5)
        assert int(target[0]) == rounds * block
        emit("bandwidth", what="read", block=block, warps=warps, rounds=rounds, gb_s=gigabytes / elapsed / 1e9)
    elapsed = seconds([lambda: target.copy_(source)], 5)
    emit("bandwidth", what="copy, both ways", gb_s=2 * gigabytes / elapsed / 1e9)


# Correctness ----------------------------------------------------------------------------------------------------------


def worst(result: torch.Tensor, expected: torch.Tensor, written: torch.Tensor | None = None) -> float:
    """Largest error as a share of what is allowed; infinite when poison was read, or left, or overwritten."""
    if written is not None:
        if not result[~written].isnan().all():
            return torch.inf
        result, expected = result[written], expected[written]
    error = (result.float() - expected.float()).abs() / (1 + expected.float().abs()) / TOLERANCE[result.dtype]
    return torch.inf if error.isnan().any() else float(error.max())


def check_attention(shape: Shape, lens: list[int], contexts: list[int], window: int | None) -> None:
    q, kv, rows = make_rows(shape, lens, contexts, window)
    heads, view = (shape.heads, shape.kv_heads, shape.dim), View(shape.dim**-0.5, window)
    expected = attend_torch(q, kv, rows, view)
    limit = max(1, min(8, 64 // (shape.heads // shape.kv_heads)))
    decoded = torch.tensor([0 < n <= limit for n in lens for _ in range(n)])
    for num_rows in (len(lens), 1 << 16):  # as many rows as fill the card are not split
        plan = plan_decode(num_rows, heads, limit, max(contexts), kv)
        for memory in (plan.partial, plan.weights):
            if memory is not None:
                memory.fill_(torch.nan)
        result = torch.full_like(q, torch.nan)
        decode_triton(q, kv, result, rows, plan, view)
        share = worst(result.cpu(), expected.cpu(), decoded)
        emit("correct", kernel="decode", shape=str(shape), window=window, splits=plan.num_splits, error=share)
    result = torch.full_like(q, torch.nan)
    prompt_triton(q, kv, result, rows, plan_prompt(rows, 2, (len(lens), len(q)), heads, kv), view)
    written = torch.tensor([n >= 2 for n in lens for _ in range(n)])
    share = worst(result.cpu(), expected.cpu(), written)
    emit("correct", kernel="prompt", shape=str(shape), window=window, error=share)


def correct() -> None:
    shapes = [Shape(4, 4, 128), Shape(28, 4, 128), Shape(8, 2, 64), Shape(8, 1, 80), Shape(6, 2, 96), Shape(4, 2, 256)]
    for index, shape in enumerate(shapes[:1] if REHEARSES else shapes):
        for window in (None, 70) if index < 2 else (None,):
            lens, contexts = [1, 0, 8, 1, 150, 3, 9], [1, 0, 8, 333, 150, 70, 400]
            check_attention(replace(shape, dtype=DTYPE), lens, contexts, window)
    check_attention(Shape(4, 2, 64, dtype=torch.float32), [1, 3, 40], [200, 64, 90], None)
    x, residual, weight = randn(37, 3584), randn(37, 3584), randn(3584)
    normed, total = norm.add_rms_norm_triton(x, residual, weight, 1e-6)
    twins = norm.add_rms_norm_torch(x, residual, weight, 1e-6)
    emit("correct", kernel="add_rms_norm", error=max(worst(normed, twins[0]), worst(total, twins[1])))
    gate_up = randn(9, 2 * 5504) * 4
    share = worst(activation.silu_and_multiply_triton(gate_up), activation.silu_and_multiply_torch(gate_up))
    emit("correct", kernel="silu_and_multiply", error=share)
    correct_memory()


def correct_memory() -> None:
    """The kernels that write KV memory; what they must leave alone is NaN."""
    for heads, kv_heads, dim in (MHA, GQA, (6, 2, 80)):
        qkv, angles = randn(20, (heads + 2 * kv_heads) * dim), torch.rand(20, 1, dim // 2, device=DEVICE) * 99
        slots = torch.randperm(6 * 16, device=DEVICE)[:20]
        slots[3] = -1
        memories = [torch.full((6, 2, kv_heads, 16, dim), torch.nan, dtype=DTYPE, device=DEVICE) for _ in range(2)]
        functions = (rope_store.rotate_and_store_triton, rope_store.rotate_and_store_torch)
        q, expected = (
            function(qkv, angles.cos(), angles.sin(), kv, slots)
            for function, kv in zip(functions, memories, strict=True)
        )
        share = max(worst(q, expected), worst(*memories, ~memories[1].isnan()) if memories[1].numel() else 0)
        emit("correct", kernel="rotate_and_store", heads=heads, dim=dim, error=share)
    layers = [randn(8, 2, 4, 16, 128) for _ in range(3)]
    expected_layers = [layer.clone() for layer in layers]
    copy_blocks.copy_blocks_triton(*copy_arguments(layers, [(0, 4, 16), (0, 5, 3), (1, 6, 0)]))
    copy_blocks.copy_blocks_torch(expected_layers, [(0, 4, 16), (0, 5, 3), (1, 6, 0)])
    equal = all(torch.equal(a, b) for a, b in zip(layers, expected_layers, strict=True))
    emit("correct", kernel="copy_blocks", error=0.0 if equal else torch.inf)


def copy_arguments(
    layers: list[torch.Tensor], chosen: list[tuple[int, int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    addresses = torch.tensor([layer.data_ptr() for layer in layers], device=DEVICE)
    return layers[0], addresses, torch.tensor(chosen, dtype=torch.int32, device=DEVICE)


# Attention ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """Rows of equal lengths over several layers' memory, blocks in random order."""

    heads: Heads
    rows: Rows
    q: torch.Tensor
    memories: list[torch.Tensor]
    view: View
    length: int
    context: int


def workload(heads: Heads, num_rows: int, length: int, context: int) -> Workload:
    if REHEARSES:
        num_rows, length, context = min(num_rows, 2), min(length, 20), min(context, 40)
        heads = (heads[0] // heads[1], 1, 16)
    blocks = -(-context // 16)
    num_bytes = num_rows * blocks * 16 * heads[1] * heads[2] * 4
    size = (num_rows * blocks, 2, heads[1], 16, heads[2])
    memories = [
        randn(*size) if REHEARSES else torch.randn(size, device=DEVICE, dtype=DTYPE) for _ in range(copies(num_bytes))
    ]
    tables = torch.randperm(num_rows * blocks, device=DEVICE).to(torch.int32).view(num_rows, blocks)
    starts = torch.arange(num_rows + 1, device=DEVICE, dtype=torch.int32) * length
    contexts = torch.full((num_rows,), context, dtype=torch.int32, device=DEVICE)
    q = randn(num_rows * length, heads[0], heads[2])
    return Workload(heads, Rows(starts, contexts, tables), q, memories, View(heads[2] ** -0.5), length, context)


def time_decode(load: Workload, plan: DecodePlan) -> dict[str, float]:
    result = torch.empty_like(load.q)
    calls = [lambda kv=kv: decode_triton(load.q, kv, result, load.rows, plan, load.view) for kv in load.memories]
    elapsed = seconds(calls)
    read = len(load.rows.contexts) * load.context * load.heads[1] * load.heads[2] * 2 * load.q.element_size()
    return {"us": elapsed * 1e6, "gb_s": read / elapsed / 1e9}


def decode_large() -> None:
    """The batches whose decoding is bound by memory, with variants of the launch."""
    for name, heads, num_rows, context in (
        ("13B, 128 rows of 450", MHA, 128, 450),
        ("7B, 256 rows of 450", GQA, 256, 450),
        ("7B, 1,000 rows of 450", GQA, 1000, 450),
    ):
        load = workload(heads, num_rows, 1, context)
        default = plan_decode(len(load.rows.contexts), load.heads, max(1, 16 // (heads[0] // heads[1])), 450, load.q)
        emit("decode", load=name, launch="default", splits=default.num_splits, **time_decode(load, default))
        if heads == MHA:
            alone(name, load)
        if num_rows == 256 or REHEARSES:
            continue
        for launch in (
            (64, 4, 2),
            (64, 4, 4),
            (32, 4, 3),
            (32, 4, 4),
            (32, 2, 4),
            (128, 4, 2),
            (128, 8, 3),
            (64, 8, 3),
        ):
            try:
                timed = time_decode(load, replace(default, launch=Launch(*launch)))
                emit("decode", load=name, launch=launch, **timed)
            except Exception as error:
                emit("decode", load=name, launch=launch, error=repr(error)[:200])


def alone(name: str, load: Workload) -> None:
    """One query of one head a program, by sums instead of matrices."""
    default = replace(plan_decode(len(load.rows.contexts), load.heads, 1, load.context, load.q), packed=1)
    for launch in ((32, 4, 1), (64, 8, 1), (16, 4, 1), (64, 8, 3), (32, 2, 1), (16, 4, 4)):
        try:
            timed = time_decode(load, replace(default, launch=Launch(*launch)))
            emit("decode", load=name, packed=1, launch=launch, splits=default.num_splits, **timed)
        except Exception as error:
            emit("decode", load=name, packed=1, launch=launch, error=repr(error)[:200])


def decode_small() -> None:
    """Few rows: contexts are split; latency counts."""
    for name, heads, num_rows, length, context in (
        ("1.3B, 1 row of 200", SMALL, 1, 1, 200),
        ("1.3B, 8 rows of 200", SMALL, 8, 1, 200),
        ("7B, 1 row of 500", GQA, 1, 1, 500),
        ("7B, 8 rows of 500", GQA, 8, 1, 500),
        ("7B, 8 rows of 500, 5 queries", GQA, 8, 5, 500),
        ("7B, 64 rows of 2,000", GQA, 64, 1, 2000),
        ("7B, 1 row of 16,000", GQA, 1, 1, 16000),
    ):
        load = workload(heads, num_rows, length, context)
        group = heads[0] // heads[1]
        queries = max(1, 16 // group) if load.length == 1 else 8
        default = plan_decode(len(load.rows.contexts), load.heads, min(8, queries), load.context, load.q)
        emit("decode", load=name, launch="default", splits=default.num_splits, **time_decode(load, default))
        if heads == SMALL:
            alone(name, load)
        if default.partial is None or REHEARSES:
            continue
        for tile, warps in ((16, 2), (32, 2), (64, 4)):
            timed = time_decode(load, replace(default, launch=Launch(tile, warps, 3)))
            emit("decode", load=name, launch=(tile, warps, 3), splits=default.num_splits, **timed)


def time_prompt(load: Workload, plan: PromptPlan) -> dict[str, float]:
    result = torch.empty_like(load.q)
    calls = [lambda kv=kv: prompt_triton(load.q, kv, result, load.rows, plan, load.view) for kv in load.memories]
    elapsed = seconds(calls, 4)
    before = load.context - load.length
    pairs = len(load.rows.contexts) * (load.length * before + load.length * (load.length + 1) / 2)
    return {"us": elapsed * 1e6, "tflop_s": 4 * load.heads[0] * load.heads[2] * pairs / elapsed / 1e12}


def prompts() -> None:
    for name, heads, num_rows, length, context in (
        ("13B, prompt of 2,048", MHA, 1, 2048, 2048),
        ("13B, prompt of 8,192", MHA, 1, 8192, 8192),
        ("7B, prompt of 2,048", GQA, 1, 2048, 2048),
        ("7B, prompt of 8,192", GQA, 1, 8192, 8192),
        ("7B, 512 behind 7,680", GQA, 1, 512, 8192),
        ("7B, 8 prompts of 256", GQA, 8, 256, 256),
        ("13B, 128 behind 192", MHA, 1, 128, 320),
    ):
        load = workload(heads, num_rows, length, context)
        counts = (len(load.rows.contexts), len(load.q))
        default = plan_prompt(load.rows, 9, counts, load.heads, load.q)
        emit("prompt", load=name, launch="default", **time_prompt(load, default))
        if length == context and num_rows == 1 and not REHEARSES:
            q, k, v = (randn(1, n, length, heads[2]) for n in (heads[0], heads[1], heads[1]))
            elapsed = seconds([lambda q=q, k=k, v=v: attend_dense(q, k, v)], 4)
            emit("prompt", load=name, launch="torch, not paged", us=elapsed * 1e6)
        if length != 8192 or REHEARSES:
            continue
        for packed, *launch in ((128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 4), (64, 64, 4, 3), (64, 64, 4, 2)):
            queries = packed // (heads[0] // heads[1])
            tiles = find_tiles(load.rows, 9, queries, len(load.q) // queries + 1)
            try:
                timed = time_prompt(load, PromptPlan(packed, Launch(*launch), tiles))
                emit("prompt", load=name, packed=packed, launch=launch, **timed)
            except Exception as error:
                emit("prompt", load=name, packed=packed, launch=launch, error=repr(error)[:200])


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


# Small kernels --------------------------------------------------------------------------------------------------------


def compare(
    name: str, num_rows: int, num_bytes: int, make: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
) -> None:
    pairs = [make() for _ in range(copies(num_bytes))]
    ours, twins = seconds([pair[0] for pair in pairs]), seconds([pair[1] for pair in pairs])
    emit("fused", kernel=name, rows=num_rows, us=ours * 1e6, torch_us=twins * 1e6, gb_s=num_bytes / ours / 1e9)


def fused() -> None:
    for num_rows in (1, 2) if REHEARSES else (1, 16, 128, 1024):
        for size in (64,) if REHEARSES else (2048, 3584, 5120):
            compare(f"add_rms_norm {size}", num_rows, num_rows * size * 8, lambda n=num_rows, size=size: norms(n, size))
        for size in (64,) if REHEARSES else (5504, 13824, 18944):
            compare(f"silu {size}", num_rows, num_rows * size * 6, lambda n=num_rows, size=size: activations(n, size))
        for heads in ((2, 1, 16),) if REHEARSES else (SMALL, GQA, MHA):
            moved = num_rows * (heads[0] + 2 * heads[1]) * heads[2] * 4
            compare(f"rotate_and_store {heads}", num_rows, moved, lambda n=num_rows, heads=heads: rotations(n, heads))


def norms(num_rows: int, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, residual, weight = randn(num_rows, size), randn(num_rows, size), randn(size)
    return (
        lambda: norm.add_rms_norm_triton(x, residual, weight, 1e-5),
        lambda: norm.add_rms_norm_torch(x, residual, weight, 1e-5),
    )


def activations(num_rows: int, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x = randn(num_rows, 2 * size)
    return (
        lambda: activation.silu_and_multiply_triton(x),
        lambda: functional.silu(x[:, :size]) * x[:, size:],
    )


def rotations(num_rows: int, heads: Heads) -> tuple[Callable[[], Any], Callable[[], Any]]:
    num_heads, num_kv_heads, dim = heads
    qkv, angles = (
        randn(num_rows, (num_heads + 2 * num_kv_heads) * dim),
        torch.rand(num_rows, 1, dim // 2, device=DEVICE),
    )
    cos, sin = angles.cos(), angles.sin()
    kv = torch.zeros(num_rows, 2, num_kv_heads, 16, dim, dtype=DTYPE, device=DEVICE)
    slots = torch.randperm(num_rows, device=DEVICE) * 16
    short = (cos.to(DTYPE), sin.to(DTYPE))

    def plain() -> None:
        matrix = qkv.view(num_rows, -1, dim)
        first, second = matrix[:, : num_heads + num_kv_heads].chunk(2, dim=-1)
        turned = torch.cat((first * short[0] - second * short[1], second * short[0] + first * short[1]), -1)
        kv[slots // 16, 0, :, slots % 16] = turned[:, num_heads:]
        kv[slots // 16, 1, :, slots % 16] = matrix[:, num_heads + num_kv_heads :]

    return lambda: rope_store.rotate_and_store_triton(qkv, cos, sin, kv, slots), plain


MATRICES: dict[str, tuple[int, int]] = {
    "1.3B qkv": (6144, 2048),
    "1.3B out": (2048, 2048),
    "1.3B gate_up": (11008, 2048),
    "1.3B down": (2048, 5504),
    "1.3B head": (32256, 2048),
    "7B qkv": (4608, 3584),
    "7B out": (3584, 3584),
    "7B gate_up": (37888, 3584),
    "7B down": (3584, 18944),
    "7B head": (152064, 3584),
    "13B qkv": (15360, 5120),
    "13B out": (5120, 5120),
    "13B gate_up": (27648, 5120),
    "13B down": (5120, 13824),
    "13B head": (32016, 5120),
}
"""Rows and columns."""

GEMV_LAUNCHES = ((4, 1024, 4), (4, 2048, 4), (2, 2048, 4), (8, 2048, 8), (2, 512, 2), (4, 512, 2), (8, 1024, 8))
"""Rows, columns and warps of variants for one row of x, beside what plan_gemv chooses."""


def gemvs() -> None:
    """A few rows times a matrix, ours beside the library; gate_up also with SiLU·mul behind."""
    for name, size in MATRICES.items():
        rows, columns = (24, 64) if REHEARSES else size
        weights = [randn(rows, columns) / columns**0.5 for _ in range(copies(rows * columns * 2))]
        for num_rows in (1, 2, 4, 8):
            x = randn(num_rows, columns)
            gated = name.endswith("gate_up")
            time_gemv(name, x, weights, None, gated=False)
            if gated:
                time_gemv(name, x, weights, None, gated=True)
            varied = num_rows == 1 and "13B" not in name and "head" not in name
            for cut in GEMV_LAUNCHES if varied else ():
                time_gemv(name, x, weights, gemv.Launch(*cut), gated=gated)
        if name in ("1.3B qkv", "1.3B out", "1.3B down"):
            chain_gemv(name, weights)
        del weights


def chain_gemv(name: str, weights: list[torch.Tensor]) -> None:
    """Norm and product in turn, each started early or not."""
    x, scale = randn(1, weights[0].shape[1]), randn(weights[0].shape[1])
    expected = gemv.gemv_torch(norm.rms_norm_torch(x, scale, 1e-5), weights[0], None)
    known = language._knows_early_launches
    for starts_early in (False,) if REHEARSES else (False, True):
        language._knows_early_launches = lambda device, starts_early=starts_early: starts_early

        def pair(weight: torch.Tensor) -> torch.Tensor:
            return gemv.gemv_triton(norm.rms_norm_triton(x, scale, 1e-5), weight, None)

        error = worst(pair(weights[0]), expected)
        elapsed = seconds([lambda w=w: pair(w) for w in weights], num_replays=4)
        emit("gemv", matrix=name, what="norm, then product", early=starts_early, error=error, us=elapsed * 1e6)
    language._knows_early_launches = known


def time_gemv(
    name: str, x: torch.Tensor, weights: list[torch.Tensor], launch: gemv.Launch | None, *, gated: bool
) -> None:
    """One line; a launch of its own is not compared with the library again."""
    ours, twin = (gemv.gated_gemv_triton, gemv.gated_gemv_torch) if gated else (gemv.gemv_triton, gemv.gemv_torch)
    chosen = launch or gemv.plan_gemv(len(x), x.shape[1], gated)
    line: dict[str, Any] = {"matrix": name, "rows": len(x), "gated": gated, "launch": str(chosen)}
    num_bytes = weights[0].numel() * 2
    try:
        line["error"] = worst(ours(x, weights[0], None, chosen), twin(x, weights[0], None))
        elapsed = seconds([lambda w=w: ours(x, w, None, chosen) for w in weights], num_replays=4)
        line |= {"us": elapsed * 1e6, "gb_s": num_bytes / elapsed / 1e9}
        if launch is None:
            elapsed = seconds([lambda w=w: linear(x, w, gated=gated) for w in weights], num_replays=4)
            line |= {"linear_us": elapsed * 1e6, "linear_gb_s": num_bytes / elapsed / 1e9}
    except Exception as error:
        line["failed"] = repr(error)[:200]
    emit("gemv", **line)


def linear(x: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> torch.Tensor:
    product = functional.linear(x, weight)
    return activation.silu_and_multiply(product) if gated else product


def planning() -> None:
    """What a step pays once: the tiles of prompts, copies of blocks, and the host's time to launch."""
    load = workload(GQA, 256, 8, 64)
    elapsed = seconds([lambda: plan_prompt(load.rows, 3, (4, len(load.q)), load.heads, load.q)])
    emit("planning", what="tiles of 256 rows", us=elapsed * 1e6)
    layers = [randn(16, 2, 4, 16, 128) for _ in range(2 if REHEARSES else 28)]
    arguments = copy_arguments(layers, [(index, 8 + index, 16) for index in range(8)])
    elapsed = seconds([lambda: copy_blocks.copy_blocks_triton(*arguments)])
    emit("planning", what="8 copies in 28 layers", us=elapsed * 1e6)
    x, weight = randn(1, 2048), randn(2048)
    norm.rms_norm_triton(x, weight, 1e-5)
    start = time.perf_counter()
    for _ in range(200):
        norm.rms_norm_triton(x, weight, 1e-5)
    emit("planning", what="host time of one launch", us=(time.perf_counter() - start) / 200 * 1e6)


def sampling() -> None:
    """Draws from float32 logits: greedy and with a temperature, beside torch's argmax and cumulative sums."""
    vocab = 5000 if REHEARSES else 152064
    for num_rows in (3,) if REHEARSES else (1, 16, 128, 1000):
        inputs = [torch.randn(num_rows, vocab, device=DEVICE) * 3 for _ in range(copies(num_rows * vocab * 4))]
        draws("greedy", inputs, torch.zeros(num_rows, device=DEVICE), [lambda x=x: x.argmax(-1) for x in inputs])
        plain = [lambda x=x: x.softmax(-1).cumsum_(-1) for x in inputs]
        draws("temperature", inputs, torch.full((num_rows,), 0.8, device=DEVICE), plain)


def draws(name: str, inputs: list[torch.Tensor], temperature: torch.Tensor, plain: Sequence[Callable[[], Any]]) -> None:
    uniform = torch.rand(len(temperature), device=DEVICE)
    tokens = sample.draw_triton(inputs[0], temperature, uniform)[:64]
    expected = sample.draw_torch(inputs[0][:64], temperature[:64], uniform[:64])
    ours = seconds([lambda x=x: sample.draw_triton(x, temperature, uniform) for x in inputs])
    gb_s = inputs[0].numel() * 4 / ours / 1e9
    equal = float((tokens == expected).float().mean())
    times = {"us": ours * 1e6, "torch_us": seconds(plain) * 1e6}
    emit("sampling", what=name, rows=len(temperature), gb_s=gb_s, equal=equal, **times)


def cutting() -> None:
    """Top-p of all rows in one launch, in place; each call on a copy of its own, whose time is given beside."""
    vocab = 3000 if REHEARSES else 152064
    for num_rows in (3,) if REHEARSES else (1, 64, 264, 1000):
        logits = torch.randn(num_rows, vocab, device=DEVICE) * 3
        target, rows = torch.empty_like(logits), torch.arange(num_rows, device=DEVICE)
        temperature, top_p = (torch.full((num_rows,), value, device=DEVICE) for value in (0.8, 0.95))
        top_k = torch.full((num_rows,), vocab, dtype=torch.int32, device=DEVICE)

        def cut() -> None:
            target.copy_(logits)  # noqa: B023
            likeliest.keep_triton(target, rows, temperature, top_k, top_p)  # noqa: B023

        copied = seconds([lambda: target.copy_(logits)])  # noqa: B023
        emit("cutting", rows=num_rows, us=1e6 * (seconds([cut]) - copied), copy_us=1e6 * copied)


# Two halves of a step -------------------------------------------------------------------------------------------------


class Halves:
    """A step's rows in halves: while one is multiplied, bound by arithmetic, the other attends, bound by memory."""

    def __init__(self, num_rows: int, context: int, num_layers: int) -> None:
        hidden, inner, heads = (64, 128, (4, 1, 16)) if REHEARSES else (3584, 18944, GQA)
        self.num_layers = num_layers
        self.load = workload(heads, num_rows // 2, 1, context)
        self.plan = plan_decode(len(self.load.rows.contexts), self.load.heads, 1, context, self.load.q)
        self.results = [torch.empty_like(self.load.q) for _ in range(2)]
        self.before = [randn((heads[0] + 2 * heads[1]) * heads[2], hidden)]
        self.behind = [randn(hidden, hidden), randn(2 * inner, hidden), randn(hidden, inner)]
        half = len(self.load.rows.contexts)
        self.inputs = {size: randn(2 * half, size) for size in (hidden, inner)}
        self.side = None if REHEARSES else torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def attend(self, half: int, layer: int) -> None:
        load = self.load
        memory = load.memories[(2 * layer + half) % len(load.memories)]
        decode_triton(load.q, memory, self.results[half], load.rows, self.plan, load.view)

    def multiply(self, weights: Sequence[torch.Tensor], num_halves: int) -> None:
        num_rows = num_halves * len(self.load.rows.contexts)
        for weight in weights:
            functional.linear(self.inputs[weight.shape[1]][:num_rows], weight)

    def in_turn(self) -> None:
        for layer in range(self.num_layers):
            self.multiply(self.before, 2)
            self.attend(0, layer)
            self.attend(1, layer)
            self.multiply(self.behind, 2)

    def beside(self) -> None:
        """Attention on a stream of its own; each half's products wait for its own attention only."""
        here = torch.cuda.current_stream()
        attended = [torch.cuda.Event(), torch.cuda.Event()]  # type: ignore[no-untyped-call]
        for layer in range(self.num_layers + 1):
            for half in range(2):
                if layer:
                    here.wait_event(attended[half])
                    self.multiply(self.behind, 1)
                if layer < self.num_layers:
                    self.multiply(self.before, 1)
                    self.side.wait_stream(here)  # type: ignore[union-attr]
                    with torch.cuda.stream(self.side):
                        self.attend(half, layer)
                        attended[half].record()


def beside() -> None:
    """A step of 1,000 rows of the 7B in turn and in halves, products on all multiprocessors or on fewer."""
    for num_rows in (4,) if REHEARSES else (512, 1000):
        halves = Halves(num_rows, 570, 2 if REHEARSES else 6)
        ms = {"in_turn": 1e3 * seconds([halves.in_turn], 1) / halves.num_layers}
        if not REHEARSES:
            torch.backends.cuda.preferred_blas_library("cublaslt")
            for left_out in (0, 8, 16, 24, 32):
                torch._C._set_sm_carveout_experimental(left_out or None)
                ms[f"beside, {left_out} left out"] = 1e3 * seconds([halves.beside], 1) / halves.num_layers
                ms[f"in turn, {left_out} left out"] = 1e3 * seconds([halves.in_turn], 1) / halves.num_layers
            torch._C._set_sm_carveout_experimental(None)
            torch.backends.cuda.preferred_blas_library("default")
        emit("beside", rows=num_rows, **ms)


SECTIONS: dict[str, Callable[[], None]] = {
    "correct": correct,
    "bandwidth": bandwidth,
    "decode_large": decode_large,
    "decode_small": decode_small,
    "prompts": prompts,
    "fused": fused,
    "gemv": gemvs,
    "planning": planning,
    "sampling": sampling,
    "cutting": cutting,
    "beside": beside,
}


class OutOfTimeError(BaseException):
    """A section's; passes through the handling of a single measurement's failure."""


def give_up(*_: object) -> None:
    raise OutOfTimeError(f"more than {SECTION_SECONDS} s")


def main() -> None:
    signal.signal(signal.SIGALRM, give_up)
    name = "rehearsal" if REHEARSES else torch.cuda.get_device_name()
    emit("device", name=name, torch=torch.__version__, triton=triton.__version__)
    chosen = [section for section in sys.argv[1:] if section in SECTIONS] or list(SECTIONS)
    for section in chosen:
        signal.alarm(SECTION_SECONDS)
        try:
            SECTIONS[section]()
        except (Exception, OutOfTimeError) as error:
            emit(section, failed=repr(error)[:400])
        finally:
            signal.alarm(0)
        if not REHEARSES:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
