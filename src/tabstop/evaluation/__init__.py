"""Quality over HTTP: what a served model gets right, and whether two such runs differ. The data that its parts share.

A set of tasks is asked of an endpoint, the programs that come of it are run (programs.py), and a Report says of every
task what became of it; two Reports of one set are compared task by task (compare.py). No engine, no torch. A new
benchmark is a set in tasks.py, or a command in cli.py that fills a Report.
"""

from __future__ import annotations

import msgspec

PASSED, REQUEST_FAILED = "", "request"


NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What reading a stranger's JSON may raise."""

MAX_SHOWN = 300
"""Characters of what an endpoint or a file says of itself, where a person reads it."""


def printable(said: object) -> str:
    """What a stranger says, short, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(said)[:MAX_SHOWN])


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A hole in a program, and a test that the filled program must pass. The form of HumanEval-Infilling's files."""

    task_id: str
    entry_point: str  # the function that the test is given
    prompt: str
    suffix: str
    test: str  # defines `check`
    canonical_solution: str = ""


class Filling(msgspec.Struct, frozen=True, kw_only=True):
    """What an endpoint put into a hole."""

    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0  # as the endpoint counts them
    num_healed_tokens: int = 0
    seconds: float = 0.0
    problem: str = ""  # why there is none


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a task."""

    task_id: str
    passed: bool
    error: str = PASSED  # why not: a Python exception's class, timeout, exit, output, killed, or request
    completion: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    num_healed_tokens: int = 0
    seconds: float = 0.0  # of the request
    problem: str = ""  # of a request that failed


class Report(msgspec.Struct, kw_only=True):
    """One run over one set."""

    kind: str = "infilling"
    version: str = ""  # of Tabstop
    created: str = ""  # ISO 8601
    set: str
    by: str = ""  # who answered: an address without a key, or a program
    model: str = ""
    settings: dict[str, str | int | float] = {}
    is_complete: bool = True  # no Ctrl-C
    results: list[Result] = []

    @property
    def num_passed(self) -> int:
        return sum(result.passed for result in self.results)
