"""How far a run is, on stderr: a moving line on a terminal, else a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tabstop.evaluation import Result

LOG_INTERVAL = 10.0  # seconds


class LiveCount:
    """`with LiveCount(console, "single-line", 100) as live: evaluate(…, live)`"""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._num_done = self._num_passed = 0
        self._logged = time.monotonic()
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        text = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[passed]} passed")
        self._progress = Progress(
            text[0], *columns, text[1], console=console, disable=not console.is_terminal, transient=True
        )
        self._task = self._progress.add_task(title, total=total, passed=0)

    def __enter__(self) -> LiveCount:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, result: Result) -> None:
        self._num_done += 1
        self._num_passed += result.passed
        self._progress.update(self._task, completed=self._num_done, passed=self._num_passed)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged >= LOG_INTERVAL:
            self._logged = now
            counts = f"{self._num_done}/{self._total} tasks, {self._num_passed} passed"
            self._console.print(f"{self._title}: {counts}", markup=False, highlight=False)
