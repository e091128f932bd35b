"""The energy of the local NVIDIA cards, by the driver's own counter, through the driver's own library (NVML).

Where nothing can be read it says why. Knows no load and no report.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from urllib.parse import urlsplit

LIBRARY = "libnvidia-ml.so.1"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
MILLI = 1e-3


class EnergyMeter:
    """Joules of all local cards that count them (Volta and later). `reason` says why there are none, else it is ""."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._handles: list[ctypes.c_void_p] = []
        self.reason = self._open(library)

    def _open(self, library: str) -> str:
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError:
            return f"no NVIDIA driver on this machine ({library} not found)"
        if (code := self._nvml.nvmlInit_v2()) != 0:
            return f"NVML did not start (error {code})"
        count = ctypes.c_uint()
        if (code := self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))) != 0 or count.value == 0:
            return f"NVML finds no card (error {code})"
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                self._handles.append(handle)
        return "" if self.joules() is not None else f"none of {count.value} cards has an energy counter"

    def joules(self) -> float | None:
        """The counters' sum since the driver was loaded; None without a card that counts."""
        total, num_read = 0.0, 0
        for handle in self._handles:
            millijoules = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0:
                total += MILLI * millijoules.value
                num_read += 1
        return total if num_read else None


@functools.cache
def local_meter() -> EnergyMeter:
    """This process's meter: the driver's library is opened once."""
    return EnergyMeter()


def start_metering(url: str) -> tuple[Callable[[], float | None], str]:
    """A function that gives the joules used since this call, and why it gives None ("" if it does not).

    The cards of this machine say nothing about a server on another one.
    """
    host = urlsplit(url).hostname or ""
    if host not in LOCAL_HOSTS:
        return (lambda: None), f"{host} is another machine"
    meter = local_meter()
    before = meter.joules()

    def used() -> float | None:
        now = meter.joules()
        return None if now is None or before is None else now - before

    return used, meter.reason
