"""Two runs beside each other: pairs, equal texts, and the test of what passes."""

from __future__ import annotations

from math import comb
from pathlib import Path

import pytest

from tabstop.errors import InputError
from tabstop.evaluation import Report, Result
from tabstop.evaluation.cli import read_report
from tabstop.evaluation.compare import compare, mcnemar


def report(verdicts: str, texts: str = "", name: str = "single-line") -> Report:
    """A letter a task: p passed, f failed, r its request failed, - not asked. `texts`: a letter each."""
    results = [
        Result(
            task_id=str(number),
            passed=verdict == "p",
            error={"f": "AssertionError", "r": "request"}.get(verdict, ""),
            completion=(texts or "x" * len(verdicts))[number],
            problem="500" if verdict == "r" else "",
        )
        for number, verdict in enumerate(verdicts)
        if verdict != "-"
    ]
    return Report(set=name, results=results)


def test_pairs_are_counted() -> None:
    result = compare(report("ppffpr-p", "aabbcccc"), report("pfpfpppr", "aabbdccc"))
    assert (result.num_tasks, result.num_left_out) == (5, 3)
    assert result.num_passed == (3, 3) and result.num_only == (1, 1) and result.p_value == 1
    assert result.num_identical == 4 and result.identical_share == 0.8
    assert [difference.task_id for difference in result.differences] == ["1", "2", "4"]
    assert (result.differences[0].first.passed, result.differences[0].second.passed) == (True, False)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 9), (9, 1), (5, 5), (3, 12)])
def test_mcnemars_exact_test_by_hand(first: int, second: int) -> None:
    total, low = first + second, min(first, second)
    expected = min(1.0, 2 * sum(comb(total, k) for k in range(low + 1)) / 2**total)
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-12)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="different sets, single-line and other"):
        compare(report("p"), report("p", name="other"))
    with pytest.raises(InputError, match="no answered task in common"):
        compare(report("p-"), report("rp"))
    twice = report("p")
    twice.results *= 2
    with pytest.raises(InputError, match="a task twice"):
        compare(twice, report("p"))
    with pytest.raises(InputError) as error:
        compare(report("p"), report("p", name="\x1b[31m"))
    assert error.value.message.isprintable()


def test_a_file_that_is_nested_deeply_is_no_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"set": "s", "more": ' + b"[" * 50_000)
    with pytest.raises(InputError, match="is no file of"):
        read_report(tmp_path / "x.json")
