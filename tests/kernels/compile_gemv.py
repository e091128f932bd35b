"""Compiles the matrix-vector kernel for Hopper, without a card; a process of its own, as the interpreter must be off.

Prints one JSON line a launch: whether its assembly keeps values in local memory, and the order of loads and waits (the
assembler may still spill registers: that shows only in its own report).
"""

from __future__ import annotations

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tabstop.kernels import gemv


def compiled(num_rows: int, size: int, columns: int, launch: gemv.Launch, gated: bool) -> dict[str, object]:
    names = ("x", "matrix", "bias", "result")
    constants = {"NUM_ROWS": num_rows, "SIZE": size, "COLUMNS": columns, "ROWS": launch.rows, "BLOCK": launch.block}
    constants |= {"ADDS": True, "GATED": gated, "EARLY": True}
    signature = dict.fromkeys(names, "*bf16") | dict.fromkeys(constants, "constexpr")
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(len(names))}
    source = ASTSource(gemv._kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": 1, "launch_pdl": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    order = re.findall(r"ld\.global\.\S+|griddepcontrol\.\w+", ptx)
    return {"local": ".local" in ptx, "order": order}


if __name__ == "__main__":
    for num_rows, gated in ((1, False), (1, True), (4, False)):
        plan = gemv.plan_gemv(num_rows, 2048, gated)
        print(json.dumps(compiled(num_rows, 5504, 2048, plan, gated)))
