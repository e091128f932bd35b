"""What people see while the server starts: progress, then one table. On a terminal bars and a table, else log lines.

Knows EngineInfo and how to say it; starts nothing. `tabstop fit` prints its answer with the same table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from tabstop.types import EngineInfo, Progress

log = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 5.0


def readable_bytes(num_bytes: float) -> str:
    """3221225472 → '3.0 GiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def describe(info: EngineInfo) -> dict[str, str]:
    """What a loaded engine is and how much fits into it, as rows for people."""
    num_slots = info.num_blocks * info.block_size
    num_fitting = num_slots // info.max_model_len if info.max_model_len else 0
    rows = {
        "model": f"{info.model} ({info.architecture})",
        "device": f"{info.device}, {info.dtype}",
        "weights": readable_bytes(info.weight_bytes),
        "KV cache": (
            f"{info.num_blocks:,} blocks of {info.block_size} tokens = {num_slots:,} tokens, "
            f"{readable_bytes(num_slots * info.kv_bytes_per_token)}"
        ),
        "longest context": f"{info.max_model_len:,} tokens",
        "requests of that length that fit": f"{num_fitting:,} (at most {info.max_num_seqs:,} samples run at once)",
        "kernels": ", ".join(f"{concept}: {name}" for concept, name in sorted(info.kernels.items())) or "none",
        "loaded in": f"{info.load_seconds:.1f} s",
    }
    if stages := ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in info.load_stages.items()):
        rows["loaded in"] += f" ({stages})"
    if info.memory:
        rows["memory"] = ", ".join(f"{part} {readable_bytes(size)}" for part, size in info.memory.items())
    return rows


def make_table(rows: Mapping[str, str], title: str) -> Table:
    """Two columns: what, and its value."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


class StartupView:
    """Shows progress and the table. With `plain` (or without a terminal) it logs instead."""

    def __init__(self, console: Console | None = None, *, plain: bool = False) -> None:
        self._console = console or Console(stderr=True)
        self._plain = plain or not self._console.is_terminal
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._logged: tuple[str, float] = ("", 0.0)  # stage, and when on time.monotonic()

    def show_progress(self, progress: Progress) -> None:
        if self._plain:
            self._log_progress(progress)
        else:
            self._draw_progress(progress)

    def _log_progress(self, progress: Progress) -> None:
        stage, when = self._logged
        if progress.stage == stage and time.monotonic() < when + LOG_INTERVAL_SECONDS:
            return
        self._logged = (progress.stage, time.monotonic())
        percent = 100 * progress.done // progress.total if progress.total else 0
        log.info("loading: %s %d %%", progress.stage, percent)

    def _draw_progress(self, progress: Progress) -> None:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
            self._bars = Bars(*columns, console=self._console, transient=True)
            self._bars.start()
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(progress.stage)
        self._bars.update(self._tasks[progress.stage], completed=progress.done, total=progress.total)

    def show_table(self, info: EngineInfo, url: str) -> None:
        """The end of a successful start."""
        self.close()
        rows = {**describe(info), "URL": url}
        if self._plain:
            log.info("ready: %s", " · ".join(f"{name}: {value}" for name, value in rows.items()))
        else:
            self._console.print(make_table(rows, "Tabstop is ready"))

    def close(self) -> None:
        """Takes the bars away."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
