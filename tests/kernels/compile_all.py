"""Compiles every kernel for Hopper, without a card; a process of its own, as the interpreter must be off.

The launchers run as they would, on tensors of the host, but each launch ends with the compiled kernel. Prints one JSON
line a launch: the kernel, whether its assembly keeps values in local memory (the assembler may still spill registers:
that shows only in its own report), and the order of its loads and of its dealings with its neighbours. The last line
says how many kernels a rehearsal compiled, and how many were missing after it.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tabstop.kernels import (
    activation,
    copy_blocks,
    decode,
    feed,
    gemv,
    language,
    likeliest,
    norm,
    prefix,
    prompt,
    rope_store,
    sample,
)
from tabstop.kernels.attention import Rows, Sharing, View

EARLY = {"EARLY": True, "launch_pdl": True}
HEADS = ((16, 16, 128), (28, 4, 128), (9, 3, 64))


class NoCard:
    """What a launcher asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    kernel = run(function, *arguments, grid=grid, warmup=True, **options)
    ptx = kernel.asm["ptx"]
    name = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"
    order = re.findall(r"ld\.global\.\S+|griddepcontrol\.\w+", ptx)
    print(json.dumps({"kernel": name, "local": ".local" in ptx, "order": order}))
    return kernel


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def attend(heads: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, dim = heads
    counts = values(64, dtype=torch.int32)
    rows = Rows(counts, counts[:-1], values(63, 256, dtype=torch.int32))
    q, kv = values(64, num_heads, dim), values(8, 2, num_kv_heads, 16, dim)
    qkv, angles = values(64, (num_heads + 2 * num_kv_heads) * dim), values(64, 1, dim // 2)
    rope_store.rotate_and_store_triton(qkv, angles, angles, kv, values(64, dtype=torch.int64))
    sharing = Sharing(counts[:-1], values(15, prefix.width_of(num_heads // num_kv_heads, q.dtype), dtype=torch.int32))
    for num_rows, shared in ((1, None), (63, None), (1, sharing), (63, sharing)):
        before = prefix.plan_prefix(shared, heads, q) if shared else None
        plan = decode.plan_decode(num_rows, heads, decode.longest_rows(num_heads // num_kv_heads)[0], 4096, q, before)
        decode.decode_triton(q, kv, torch.empty_like(q), rows, plan, View(1.0))
    prompt.prompt_triton(q, kv, torch.empty_like(q), rows, prompt.plan_prompt(rows, 9, (7, 64), heads, q), View(1.0))


def others() -> None:
    x, weight = values(4, 2048), values(2048)
    norm.rms_norm_triton(x, weight, 1e-5)
    norm.rms_norm_triton(values(4, 8, 64)[:, :4], values(64), 1e-5)
    norm.add_rms_norm_triton(x, x, weight, 1e-5)
    activation.silu_and_multiply_triton(x)
    matrix, bias = values(5504, 2048), values(5504)
    gemv.gemv_triton(x[:1], matrix, bias)
    gemv.gated_gemv_triton(x[:1], matrix, bias)
    gemv.gemv_triton(x, matrix, bias)
    gemv.wide_gemv_triton(x[:1], matrix)
    ids = values(4, dtype=torch.int64)
    feed.known_ids_triton(ids, ids)
    floats, logits = values(4, dtype=torch.float32), values(4, 32256, dtype=torch.float32)
    sample.draw_triton(logits, floats, floats)
    likeliest.keep_triton(logits, ids, floats, values(4, dtype=torch.int32), floats.double())
    copy_blocks.copy_blocks_triton(values(8, 2, 4, 16, 128), ids, values(3, 3, dtype=torch.int32))


def rehearse() -> dict[str, int]:
    """How many kernels are compiled in a rehearsal, and how many when the same launches come again."""
    counts = []
    for context in (language.rehearsal(2), nullcontext()):
        compiled: list[str] = []
        knobs.runtime.jit_post_compile_hook = lambda *, key, **_: compiled.append(key)  # noqa: B023
        with context:
            attend((12, 2, 64))
        counts.append(len(compiled))
    return {"rehearsed": counts[0], "missing": counts[1]}


if __name__ == "__main__":
    driver.set_active(NoCard())
    run = JITFunction.run
    JITFunction.run = compile_only
    for module in (activation, decode, feed, gemv, norm, prefix, rope_store):
        module.early = lambda tensor: EARLY
    others()
    for each in HEADS:
        attend(each)
    JITFunction.run = lambda *arguments, **options: run(*arguments, **options | {"warmup": True})
    print(json.dumps(rehearse()))
