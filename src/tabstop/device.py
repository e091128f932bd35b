"""The machine we are on: which device, compute type and size of a step, how much memory is free. Allocates nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from tabstop.config import EngineConfig
from tabstop.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")


def resolve_device(option: str) -> str:
    """'cpu' or 'cuda' behind --device. Raises ConfigError for 'cuda' without a usable GPU."""
    if option == "cpu":
        return option
    import torch

    available = torch.cuda.is_available()
    if option == "cuda" and not available:
        raise ConfigError("--device is 'cuda', but torch sees no GPU; use 'cpu', or install a CUDA build of torch")
    return "cuda" if available else "cpu"


def resolve_dtype(option: str, checkpoint_dtype: str | None, device: str) -> str:
    """The compute type behind --dtype: on the CPU float32; on a GPU the checkpoint's, or bfloat16 for float32."""
    if option != "auto":
        return option
    if device == "cpu":
        return "float32"
    return "bfloat16" if checkpoint_dtype in (None, "float32") else checkpoint_dtype


@dataclass(frozen=True, slots=True)
class BatchSize:
    """How much a step may hold."""

    max_num_seqs: int
    max_num_batched_tokens: int


CPU_BATCH, GPU_BATCH, SMALL_GPU_BATCH = BatchSize(64, 512), BatchSize(1024, 2048), BatchSize(256, 2048)
"""What a device takes when nothing else is said."""

SMALL_GPU_BYTES = 64 << 30
"""Below it, logits of a thousand rows (0.6 GB for 150,000 tokens) would take memory that sequences need more."""


def default_batch_size(device: str, memory_bytes: int) -> BatchSize:
    """memory_bytes: all that the device has."""
    if device == "cpu":
        return CPU_BATCH
    return GPU_BATCH if memory_bytes >= SMALL_GPU_BYTES else SMALL_GPU_BATCH


def resolve_batch_size(config: EngineConfig, device: str, memory_bytes: int) -> BatchSize:
    """What is left out follows the device, and what is given: every sample must get a token a step."""
    default = default_batch_size(device, memory_bytes)
    num_tokens = config.max_num_batched_tokens or max(default.max_num_batched_tokens, config.max_num_seqs or 0)
    return BatchSize(config.max_num_seqs or min(default.max_num_seqs, num_tokens), num_tokens)


def default_num_front_ends() -> int:
    """One feeds some hundred streams; where there are cores, a thousand may come."""
    return 4 if num_cores() >= 8 else 1


def num_cores() -> int:
    """Those that this process may run on, or as many as the container's quota pays for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, quota_cores(CGROUP) or allowed)


def quota_cores(cgroup: Path) -> int | None:
    """Whole cores of the container's CPU quota (cgroup 2), at least 1; None without one.

    A thread more than that would be stopped in the middle of a step, and all others would wait for it.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def total_bytes(device: str) -> int:
    """All memory of 'cpu' or 'cuda', used or not."""
    if device == "cpu":
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.mem_get_info()[1])


def free_bytes(device: str, gpu_memory_utilization: float) -> int:
    """Bytes that may still be used on 'cpu' or 'cuda'; on a GPU only up to the given share of all its memory."""
    if device == "cpu":
        return free_host_bytes(CGROUP)
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(free - (1 - gpu_memory_utilization) * total)


def free_host_bytes(cgroup: Path) -> int:
    """The smaller of the machine's available memory and what the container's limit leaves (cgroup 2)."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such limit here
        return available
    if limit == "max":
        return available
    reclaimable = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    return min(available, int(limit) - used + reclaimable)
