"""Where a start's time went, and where a card's memory is after it, beside what the driver says is used.

On a CPU no memory is booked: the operating system gives pages when they are first touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORTH_TELLING = 0.05
"""Seconds."""


class StartAccount:
    """Bytes and seconds by part. "context": what was used before the first, by the driver, this process and others."""

    def __init__(self, device: str) -> None:
        self._is_gpu = device == "cuda"
        self._start = time.monotonic()
        self.parts: dict[str, int] = {}
        self.stages: dict[str, float] = {}
        if self._is_gpu:
            torch.cuda.empty_cache()  # what an engine before this one left
            self.parts["context"] = _driver_bytes()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        if seconds >= WORTH_TELLING:
            self.stages[stage] = seconds

    @contextmanager
    def book(self, part: str) -> Iterator[None]:
        """Its time, and its memory: what is allocated inside, and still is at the end."""
        with self.time(part):
            if not self._is_gpu:
                yield
                return
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            yield
            torch.cuda.empty_cache()
            self.parts[part] = torch.cuda.memory_reserved() - before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def close(self) -> dict[str, int]:
        """The parts, and "driver": all that the driver counts, of which "libraries" is what no part explains."""
        if self._is_gpu:
            driver = _driver_bytes()
            self.parts |= {"libraries": driver - sum(self.parts.values()), "driver": driver}
        return self.parts


def _driver_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
