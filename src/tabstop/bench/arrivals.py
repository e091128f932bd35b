"""When requests are sent: absolute schedules, drawn before the run so that no lateness can pile up.

Knows random numbers only. All functions return ascending offsets from the start. unit: seconds
"""

from __future__ import annotations

import math

import numpy as np

from tabstop.bench.statistics import Floats
from tabstop.errors import ConfigError

PROCESSES = ("constant", "poisson", "gamma")


def arrivals(process: str, rate: float, num_arrivals: int, rng: np.random.Generator, shape: float = 1.0) -> Floats:
    """Offsets of `num_arrivals` at `rate` a second. shape: (num_arrivals,)

    gamma: gaps with shape parameter `shape`, coefficient of variation 1/sqrt(shape); below 1 is burstier than Poisson.
    The gaps are never rescaled to end at n/rate: that would take the count's variance away.
    Raises ConfigError for an unknown process or a rate that is not positive.
    """
    if not 0 < rate < math.inf:
        raise ConfigError(f"the rate is {rate:g}; it must be over 0 requests a second")
    if process == "constant":
        return np.arange(num_arrivals, dtype=np.float64) / rate
    if process == "poisson":
        gaps = rng.exponential(1 / rate, num_arrivals)
    elif process == "gamma":
        if shape <= 0:
            raise ConfigError(f"the gamma shape is {shape:g}; it must be over 0 (1 is Poisson, smaller is burstier)")
        gaps = rng.gamma(shape, 1 / (rate * shape), num_arrivals)
    else:
        raise ConfigError(f"unknown arrival process {process!r}; choose one of {', '.join(PROCESSES)}")
    return np.cumsum(gaps)


def coefficient_of_variation(offsets: Floats) -> float:
    """Of the gaps; 1 for Poisson, 0 for constant."""
    gaps = np.diff(np.sort(offsets))
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else 0.0


def dispersion(offsets: Floats, bin_length: float) -> float:
    """Variance / mean of the counts in bins of `bin_length` seconds; 1 for Poisson."""
    if len(offsets) < 2:
        return 0.0
    num_bins = max(1, int((offsets.max() - offsets.min()) / bin_length))
    counts, _ = np.histogram(offsets, bins=num_bins)
    return float(counts.var() / counts.mean()) if counts.mean() > 0 else 0.0
