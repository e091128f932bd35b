"""Masks as packed bits, laid out as engine/plan.py:LateInputs says."""

from __future__ import annotations

import numpy as np


def num_words(vocab_size: int) -> int:
    """Of a mask."""
    return -(-vocab_size // 32)


def mask_of(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """int32: the bits of the ids, int64; ids beyond the vocabulary have none."""
    bits = np.zeros(num_words(vocab_size) * 32, np.uint8)
    bits[ids[ids < vocab_size]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
