"""The mutation runner, on a toy tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants import MUTANTS, ROOT, BadMutant, Mutant, main, plant

SOURCE = "def double(x):\n    return 2 * x\n"
TESTS = """
from toy import double

def test_double():
    assert double(3) == 6

def test_zero():
    assert double(0) == 0
"""
DOUBLE, ZERO = "tests/test_toy.py::test_double", "tests/test_toy.py::test_zero"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in (("src/toy.py", SOURCE), ("tests/test_toy.py", TESTS), ("pyproject.toml", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def fault(old: str = "2 * x", new: str = "3 * x", *tests: str) -> Mutant:
    return Mutant("a fault", "src/toy.py", old, new, tests or (DOUBLE,))


def test_a_noticed_fault_is_killed_and_the_tree_untouched(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([fault()], tree) == 0
    assert "1 of 1 faults killed" in capsys.readouterr().out
    assert (tree / "src/toy.py").read_text() == SOURCE


def test_a_fault_that_nobody_notices_survives(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([fault("2 * x", "3 * x", ZERO)], tree) == 1
    assert "SURVIVED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (fault("5 * x"), "occurs 0 times"),
        (fault("x"), "occurs 2 times"),
        (Mutant("a fault", "src/gone.py", "a", "b", (DOUBLE,)), "there is no src/gone.py"),
    ],
)
def test_a_fault_without_its_place_is_refused(tree: Path, mutant: Mutant, message: str) -> None:
    with pytest.raises(BadMutant, match=message):
        plant(tree, mutant)
    assert (tree / "src/toy.py").read_text() == SOURCE


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (fault("2 * x", "2 *", DOUBLE), "could not run"),
        (fault("2 * x", "3 * x", "tests/test_toy.py::test_gone"), "do not pass without a fault"),
    ],
)
def test_a_table_that_does_not_fit_fails_loudly(
    tree: Path, capsys: pytest.CaptureFixture[str], mutant: Mutant, message: str
) -> None:
    assert main([mutant], tree) == 2
    assert message in capsys.readouterr().err


def test_every_fault_still_has_its_place(tmp_path: Path) -> None:
    """The cheap half of `make mutants`, in every run."""
    for mutant in MUTANTS:
        copy = tmp_path / mutant.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / mutant.file).read_text())
        plant(tmp_path, mutant)
        assert copy.read_text() != (ROOT / mutant.file).read_text()
        for test in mutant.tests:
            path, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), test
