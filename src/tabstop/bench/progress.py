"""Live progress on stderr: how far, how fast. A terminal gets a moving line, a log gets a line every 5 seconds."""

from __future__ import annotations

import collections
import statistics
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tabstop.bench.metrics import is_failure
from tabstop.bench.records import Record

LOG_INTERVAL = 5.0  # seconds
RATE_WINDOW = 5.0  # seconds


class LiveProgress:
    """`with LiveProgress(console) as live: pool.run(plan, live.task("run", 100))`"""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rates]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> LiveProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def task(self, title: str, total: int | None) -> RunProgress:
        for old in self._progress.task_ids:
            self._progress.remove_task(old)
        number = self._progress.add_task(escape(title), total=total, rates="")
        return RunProgress(self._progress, number, title, total, self._console)


class RunProgress:
    """One run's callback. Called from several threads."""

    def __init__(self, progress: Progress, task: TaskID, title: str, total: int | None, console: Console) -> None:
        self._progress, self._task, self._title, self._total, self._console = progress, task, title, total, console
        self._lock = threading.Lock()
        self._recent: collections.deque[tuple[float, int]] = collections.deque()
        self._first_tokens: collections.deque[float] = collections.deque(maxlen=200)
        self._num_done = self._num_failed = 0
        self._began = self._logged = time.monotonic()

    def __call__(self, record: Record) -> None:
        with self._lock:
            now = time.monotonic()
            self._num_done += 1
            self._num_failed += is_failure(record)
            self._recent.append((now, record.num_tokens or len(record.chunks)))
            while self._recent[0][0] < now - RATE_WINDOW:
                self._recent.popleft()
            if record.chunks and not record.is_whole:
                self._first_tokens.append(record.chunks[0].at - record.intended)
            self._progress.update(self._task, completed=self._num_done, rates=self._rates(now))
            if not self._console.is_terminal and now - self._logged >= LOG_INTERVAL:
                self._logged = now
                of_total = f"/{self._total}" if self._total else ""
                self._console.print(
                    f"{self._title}: {self._num_done}{of_total} requests, {self._rates(now)}", markup=False
                )

    def _rates(self, now: float) -> str:
        span = max(0.5, min(RATE_WINDOW, now - self._began))
        tokens = sum(count for _, count in self._recent)
        first = f"{1e3 * statistics.median(self._first_tokens):.0f} ms" if self._first_tokens else "-"
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        return f"{len(self._recent) / span:.1f} req/s, {tokens / span:.0f} tok/s, TTFT p50 {first}{failed}"
