"""Where a card's memory is after a start: what each stage took, beside what the driver says is used. Allocates nothing.

On a CPU everything is empty: the operating system gives pages when they are first touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class MemoryAccount:
    """Bytes by part. "context": what was used before the first stage, by the driver, this process and others."""

    def __init__(self, device: str) -> None:
        self._is_gpu = device == "cuda"
        self.parts: dict[str, int] = {}
        if self._is_gpu:
            torch.cuda.empty_cache()  # what an engine before this one left
            self.parts["context"] = _driver_bytes()

    @contextmanager
    def book(self, part: str) -> Iterator[None]:
        """What is allocated inside, and still is at the end, is the part's."""
        if not self._is_gpu:
            yield
            return
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        yield
        torch.cuda.empty_cache()
        self.parts[part] = torch.cuda.memory_reserved() - before

    def close(self) -> dict[str, int]:
        """The parts, and "driver": all that the driver counts, of which "libraries" is what no part explains."""
        if self._is_gpu:
            driver = _driver_bytes()
            self.parts |= {"libraries": driver - sum(self.parts.values()), "driver": driver}
        return self.parts


def _driver_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
