"""The environment of a run: machine, load, software, accelerator.

Reads only local, public facts; never the environment's variables. Absent facts are absent, not guessed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import Any

from tabstop.device import num_cores

GPU_FIELDS = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,persistence_mode"
PACKAGES = ("tabstop", "aiohttp", "numpy", "scipy", "msgspec", "tokenizers")


def fingerprint() -> dict[str, Any]:
    """Facts that decide whether two reports may be put side by side."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "memory_gib": _memory_gib(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _gpus() -> list[dict[str, str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    names = GPU_FIELDS.split(",")
    return [
        dict(zip(names, (part.strip() for part in line.split(",")), strict=False)) for line in done.stdout.splitlines()
    ]
