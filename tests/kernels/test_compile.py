"""Every kernel compiles for a card that is not here: what the interpreter takes, the compiler need not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = {
    *("sample.scan_kernel", "sample.draw_kernel", "likeliest.keep_kernel", "copy_blocks._kernel"),
    *("prompt.find_tiles_kernel", "prompt.prompt_kernel"),
}
"""Kernels that are not started early."""


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """What compile_all.py says of each."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(("src", "."))}
    command = [sys.executable, "-m", "tests.kernels.compile_all"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def launches(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines[:-1]


def test_a_rehearsal_leaves_no_kernel_to_be_compiled(lines):
    assert lines[-1]["rehearsed"] >= 8 and lines[-1]["missing"] == 0, lines[-1]


def test_every_kernel_keeps_its_values_in_registers_and_waits_for_its_neighbours(launches):
    assert len({launch["kernel"] for launch in launches}) >= 11
    for launch in launches:
        waits = [launch["order"].count(f"griddepcontrol.{what}") for what in ("launch_dependents", "wait")]
        assert waits == ([0, 0] if launch["kernel"] in PLAIN else [1, 1]) and not launch["local"], launch


def test_products_load_weights_before_they_wait_and_x_behind(launches):
    products = [launch["order"] for launch in launches if launch["kernel"] == "gemv._kernel"]
    assert len(products) == 4
    for order in products:
        wait = order.index("griddepcontrol.wait")
        before, behind = order[:wait], order[wait + 1 :]
        assert before[0] == "griddepcontrol.launch_dependents"
        assert before[1:] and all("evict_first" in load or "L2" in load for load in before[1:])
        assert any(".v4" in load for load in before[1:]) and behind
