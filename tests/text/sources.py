"""Real code to tokenise: the standard library of the Python that runs the tests."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path


def code_lines(num_lines: int, seed: int = 0) -> list[str]:
    """Lines with their ends, from files that every Python has."""
    folder = Path(sysconfig.get_path("stdlib"))
    lines = []
    for name in ("argparse.py", "ast.py", "datetime.py", "decimal.py", "inspect.py", "pickletools.py", "typing.py"):
        path = folder / name
        lines += path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return random.Random(seed).sample(lines, min(num_lines, len(lines)))
