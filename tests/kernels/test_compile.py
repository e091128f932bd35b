"""Every kernel compiles for a card that is not here: what the interpreter takes, the compiler need not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLAIN = {
    "sample.scan_kernel",
    "sample.draw_kernel",
    "copy_blocks._kernel",
    "prompt.find_tiles_kernel",
    "prompt.prompt_kernel",
}
"""Kernels that are not started early."""


def test_every_kernel_compiles_keeps_its_values_in_registers_and_waits_for_its_neighbours() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(("src", "."))}
    command = [sys.executable, "-m", "tests.kernels.compile_all"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({line["kernel"] for line in found}) >= 11 and not any(line["local"] for line in found)
    for line in found:
        assert line["waits"] == ([0, 0] if line["kernel"] in PLAIN else [1, 1]), line
