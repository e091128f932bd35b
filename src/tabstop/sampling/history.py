"""The tokens of sequences whose sampling looks back at them, on the device.

A token's place is its position, so writing one twice changes nothing, and what lies at and beyond the position to draw
is never read: neither a preempted sequence nor a slot's former owner leaves a trace. Drawn tokens are written where
they are drawn, since with overlap the host knows them a step late. 4 bytes a token, and only of sequences that need it.
"""

from __future__ import annotations

from array import array

import numpy as np
import torch
from torch import Tensor

MIN_ROWS, MIN_LENGTH = 8, 512


def upload(host: np.ndarray, device: torch.device) -> Tensor:
    """Queued; nothing waits."""
    return torch.from_numpy(host).to(device, non_blocking=True)


class History:
    """int32 [sequences, positions], grown by doubling."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ids = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._place_of: dict[int, int] = {}  # slot → row of _ids
        self._free: list[int] = []

    def __len__(self) -> int:
        """Slots with a history."""
        return len(self._place_of)

    def admit(self, slot: int, tokens: array[int] | None) -> None:
        """A new sequence takes the slot; None: of this one nothing is kept."""
        if slot in self._place_of:
            self._free.append(self._place_of.pop(slot))
        if tokens is None:
            return
        self._grow(len(self._place_of) + 1, len(tokens))
        place = self._place_of[slot] = self._free.pop()
        known = torch.from_numpy(np.array(tokens, np.int32))
        self._ids[place, : len(tokens)] = known.to(self._device, non_blocking=True)

    def remember(self, slots: np.ndarray, positions: np.ndarray, tokens: Tensor) -> None:
        """Writes drawn tokens, int64 [N], of slots and positions int64 [N]; those of other slots are left out."""
        known = self._place_of
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in known] if known else []
        if not rows:
            return
        self._grow(0, int(positions[rows].max()) + 1)
        places = np.array([self._place_of[slot] for slot in slots[rows].tolist()], np.int64)
        row, place, position = (
            upload(each, self._device) for each in (np.array(rows, np.int64), places, positions[rows])
        )
        self._ids.index_put_((place, position), tokens[row].to(torch.int32))

    def read(self, slots: np.ndarray, num_tokens: int) -> Tensor:
        """int64 [n, num_tokens] of slots that have a history; what nobody wrote is any id of the vocabulary."""
        self._grow(0, num_tokens)
        places = np.array([self._place_of[slot] for slot in slots.tolist()], np.int64)
        return self._ids[:, :num_tokens].index_select(0, upload(places, self._device)).long()

    def _grow(self, num_rows: int, length: int) -> None:
        rows, columns = self._ids.shape
        if num_rows <= rows and length <= columns:
            return
        wider = (_doubled(rows or MIN_ROWS, num_rows), _doubled(columns or MIN_LENGTH, length))
        grown = torch.zeros(wider, dtype=torch.int32, device=self._device)
        grown[:rows, :columns] = self._ids
        self._ids = grown
        self._free += range(rows, wider[0])


def _doubled(size: int, least: int) -> int:
    while size < least:
        size *= 2
    return size
