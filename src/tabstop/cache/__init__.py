"""KV memory: who owns which block and which blocks a prompt can reuse (blocks.py), how many fit (sizing.py).

This folder knows block numbers and token ids, not tensors: the tensors' layout belongs to the attention backend, which
allocates them and copies blocks (attention/__init__.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CacheKind(StrEnum):
    """What a layer remembers. A request has one block table per kind that its model uses."""

    PAGED = "paged"  # keys and values of every position
    WINDOW = "window"  # keys and values of the last `window` positions
    LATENT = "latent"  # one compressed vector a position (MLA)
    STATE = "state"  # a fixed size a sequence (linear attention, Mamba)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What one layer stores. Declared by the layer, summed by sizing.py, allocated by the attention backend."""

    kind: CacheKind
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    def bytes_per_token(self, dtype_bytes: int) -> int:
        """Keys and values of one position."""
        return 2 * self.num_kv_heads * self.head_dim * dtype_bytes
