"""A process of its own: loads a checkpoint and prints the weights' bytes and how far resident memory rose above them.

The peak is the kernel's high-water mark, which is set back before the load.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from tests.models.oracle import load


def resident(field: str) -> int:
    """Bytes, of VmRSS or VmHWM."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    torch.set_num_threads(1)
    load(sys.argv[1])  # a tiny one: modules and allocators are warm
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = load(sys.argv[2])
    print(json.dumps({"weights": model.weight_bytes, "rise": resident("VmHWM") - before}))


if __name__ == "__main__":
    main()
