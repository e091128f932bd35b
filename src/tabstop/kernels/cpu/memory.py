"""Memory for what the CPU reads at every step: weights and KV blocks, in large pages where the system gives them."""

from __future__ import annotations

import mmap

import torch

ALIGNMENT = 64
PIECE_BYTES = 128 << 20  # of an arena; what is not used is never touched


class Arena:
    """Hands out zeroed memory from large pieces: a system gives large pages to those only, and small pages cost a third
    of the speed at which a matrix is read."""

    def __init__(self) -> None:
        self.rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], at a multiple of 64 bytes."""
        needed = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if needed > len(self.rest):
            self.rest = large_zeros(max(needed, PIECE_BYTES))
        taken, self.rest = self.rest[:num_bytes], self.rest[needed:]
        return taken


def large_zeros(num_bytes: int) -> torch.Tensor:
    """Zeroed memory from the system, in large pages where it gives them: fewer address translations."""
    memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
