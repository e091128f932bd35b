"""Two runs over the same tasks, task by task: which texts are equal, and whether one passes more than chance allows."""

from __future__ import annotations

import msgspec

from tabstop.errors import InputError
from tabstop.evaluation import Report, Result, printable


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A task of which the two runs made something else."""

    task_id: str
    first: Result
    second: Result


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Of the tasks that both runs have an answer to."""

    num_tasks: int
    num_left_out: int  # in one run only, or a request failed
    num_identical: int  # texts
    num_passed: tuple[int, int]
    num_only: tuple[int, int]  # passed in the first run only, in the second only
    p_value: float  # McNemar's exact test, two sides: how likely so uneven a split is if both are equally good
    differences: list[Difference] = []  # other texts, or another verdict

    @property
    def identical_share(self) -> float:
        return self.num_identical / self.num_tasks


def compare(first: Report, second: Report) -> Comparison:
    """Raises InputError where there is nothing to compare."""
    if first.set != second.set:
        raise InputError(f"the runs are over different sets, {printable(first.set)} and {printable(second.set)}")
    for report in (first, second):
        if len({result.task_id for result in report.results}) < len(report.results):
            raise InputError("a run has a task twice; compare files as `tabstop eval infilling` writes them")
    others = {result.task_id: result for result in second.results if not result.problem}
    pairs = [(a, others[a.task_id]) for a in first.results if not a.problem and a.task_id in others]
    if not pairs:
        raise InputError("the runs have no answered task in common")
    all_ids = {result.task_id for report in (first, second) for result in report.results}
    only_first = sum(a.passed and not b.passed for a, b in pairs)
    only_second = sum(b.passed and not a.passed for a, b in pairs)
    return Comparison(
        num_tasks=len(pairs),
        num_left_out=len(all_ids) - len(pairs),
        num_identical=sum(a.completion == b.completion for a, b in pairs),
        num_passed=(sum(a.passed for a, _ in pairs), sum(b.passed for _, b in pairs)),
        num_only=(only_first, only_second),
        p_value=mcnemar(only_first, only_second),
        differences=[
            Difference(task_id=a.task_id, first=a, second=b)
            for a, b in pairs
            if a.completion != b.completion or a.passed != b.passed
        ],
    )


def mcnemar(num_only_first: int, num_only_second: int) -> float:
    """The two-sided exact p of a split of discordant pairs (McNemar 1947, by the binomial distribution)."""
    from scipy.stats import binomtest

    num_discordant = num_only_first + num_only_second
    return float(binomtest(num_only_first, num_discordant, 0.5).pvalue) if num_discordant else 1.0
