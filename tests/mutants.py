"""`make mutants`: plants one fault at a time and asks the tests that should notice. One that lives is a hole in them.

Each fault is a textual replacement in one file of a copy of the tree. The old text must occur exactly once, so a fault
cannot silently miss its place after a refactoring. The named tests must pass without the fault, or their failing with
it would mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "pyproject.toml")

PASSED, FAILED = 0, 1
"""pytest's exit codes; every other means that the tests could not run."""

PATIENCE_SECONDS = 300
"""A fault that makes the tests hang is noticed, too."""


class BadMutant(Exception):
    """The fault or its tests do not fit the tree any more; the table must be mended."""


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    name: str
    file: str  # relative to the tree
    old: str  # occurs exactly once
    new: str
    tests: tuple[str, ...]  # pytest node ids that should fail


MUTANTS: tuple[Mutant, ...] = ()


def plant(tree: Path, mutant: Mutant) -> None:
    """Changes the file. Raises BadMutant unless the old text is there exactly once."""
    path = tree / mutant.file
    if not path.is_file():
        raise BadMutant(f"{mutant.name}: there is no {mutant.file}")
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise BadMutant(f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}, not once")
    path.write_text(text.replace(mutant.old, mutant.new))


def copy_tree(source: Path, target: Path) -> None:
    for name in COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, target / name)


def run_tests(tree: Path, tests: Sequence[str]) -> int:
    """pytest's exit code for the named tests of a tree, with that tree's package and no other. Stops at a failure."""
    environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}:{tree}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.run(command, cwd=tree, env=environment, timeout=PATIENCE_SECONDS, **quiet).returncode
    except subprocess.TimeoutExpired:
        return FAILED


def check_tests(source: Path, tests: Iterable[str]) -> None:
    """Raises BadMutant unless the tests pass on the tree as it is."""
    with tempfile.TemporaryDirectory(prefix="tabstop-mutants-") as folder:
        copy_tree(source, Path(folder))
        code = run_tests(Path(folder), list(tests))
    if code != PASSED:
        raise BadMutant(f"the tests do not pass without a fault (pytest says {code})")


def is_killed(source: Path, mutant: Mutant) -> bool:
    """Whether a test notices the fault. Raises BadMutant when the tests could not run with it."""
    with tempfile.TemporaryDirectory(prefix="tabstop-mutants-") as folder:
        copy_tree(source, Path(folder))
        plant(Path(folder), mutant)
        code = run_tests(Path(folder), mutant.tests)
    if code not in (PASSED, FAILED):
        raise BadMutant(f"{mutant.name}: the tests could not run with it (pytest says {code})")
    return code == FAILED


def main(mutants: Sequence[Mutant] = MUTANTS, source: Path = ROOT) -> int:
    """Runs all of them and reports. 0: all killed · 1: one survived · 2: the table does not fit the tree."""
    num_survivors = 0
    try:
        check_tests(source, sorted({test for mutant in mutants for test in mutant.tests}))
        for mutant in mutants:
            start = time.monotonic()
            killed = is_killed(source, mutant)
            num_survivors += not killed
            print(
                f"{'killed' if killed else 'SURVIVED':8} {time.monotonic() - start:5.1f} s  {mutant.name}", flush=True
            )
    except BadMutant as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(mutants) - num_survivors} of {len(mutants)} faults killed")
    return 1 if num_survivors else 0


if __name__ == "__main__":
    sys.exit(main())
