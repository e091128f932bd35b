"""The random number of a draw, as a pure function of (seed, candidate, position).

Counter-based, so a request's output with a seed depends on nothing but itself: not on its neighbours in the batch, on
preemption, or on how many draws came before.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: np.ndarray, candidate: np.ndarray, position: np.ndarray) -> np.ndarray:
    """uint64 [N] each → float64 [N] in [0, 1): one splitmix64 (Steele et al., OOPSLA 2014) round per input."""
    with np.errstate(over="ignore"):
        state = _mix(seed + _GOLDEN)
        state = _mix(state ^ (candidate + _GOLDEN))
        state = _mix(state ^ (position + _GOLDEN))
    fraction: np.ndarray = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection on 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed
