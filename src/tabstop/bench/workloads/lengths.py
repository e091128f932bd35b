"""Lengths as text: "128", "100:500" (uniform), "lognormal:MEDIAN:SIGMA", "128,512" (alternating). unit: tokens"""

from __future__ import annotations

import numpy as np

from tabstop.errors import ConfigError

MAX_LENGTH = 10_000_000  # no model takes so many tokens, and no machine should try to make them


def draw_lengths(written: str, num: int, rng: np.random.Generator) -> list[int]:
    """`num` lengths, each at least 1. Raises ConfigError for anything else than the four forms."""
    try:
        if written.startswith("lognormal:"):
            median, sigma = (float(part) for part in written.split(":")[1:])
            _check(median)
            return [max(1, round(x)) for x in rng.lognormal(np.log(median), sigma, num)]
        if "," in written:
            values = [int(part) for part in written.split(",")]
            _check(min(values))
            _check(max(values))
            return [values[i % len(values)] for i in range(num)]
        if ":" in written:
            low, high = (int(part) for part in written.split(":"))
            _check(low)
            _check(high)
            return [int(x) for x in rng.integers(low, high + 1, num)]
        _check(int(written))
        return [int(written)] * num
    except ValueError:
        raise ConfigError(
            f"cannot read the length {written!r}; write 128, 100:500 (uniform), 128,512 (in turn) or lognormal:1469:1.1"
        ) from None


def _check(value: float) -> None:
    if not 1 <= value <= MAX_LENGTH:
        raise ValueError
