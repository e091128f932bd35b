"""The machine: device and type behind 'auto', and a container's memory limit."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from tabstop.config import EngineConfig
from tabstop.device import (
    CGROUP,
    free_bytes,
    free_host_bytes,
    num_cores,
    quota_cores,
    resolve_batch_size,
    resolve_device,
    resolve_dtype,
)
from tabstop.engine.build import prepare_cpu
from tabstop.errors import ConfigError
from tabstop.kernels.cpu.library import Threads


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    else:
        assert resolve_device("auto") == "cpu"
        with pytest.raises(ConfigError, match=r"--device is 'cuda', but torch sees no GPU"):
            resolve_device("cuda")


@pytest.mark.parametrize(
    ("option", "checkpoint", "device", "expected"),
    [
        ("auto", "bfloat16", "cpu", "float32"),
        ("auto", None, "cpu", "float32"),
        ("auto", "float16", "cuda", "float16"),
        ("auto", "float32", "cuda", "bfloat16"),
        ("auto", None, "cuda", "bfloat16"),
        ("bfloat16", "float32", "cpu", "bfloat16"),
    ],
)
def test_types(option: str, checkpoint: str | None, device: str, expected: str) -> None:
    assert resolve_dtype(option, checkpoint, device) == expected


def test_a_container_s_limit_counts_when_it_is_below_the_machine_s(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    assert free_host_bytes(tmp_path) == pytest.approx(available, rel=0.2)  # no such files
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\nactive_file 50\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes(tmp_path) == pytest.approx(available, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_host_bytes(tmp_path) == 1000 - 700 + 150  # the page cache can be given back


def test_free_memory_here() -> None:
    assert 0 < free_bytes("cpu", 0.9) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cpu", {}, (64, 512)),
        ("cuda", {}, (1024, 2048)),
        ("small cuda", {}, (256, 2048)),
        ("cpu", {"max_num_seqs": 600}, (600, 600)),
        ("cuda", {"max_num_batched_tokens": 256}, (256, 256)),
        ("cuda", {"max_num_batched_tokens": 300, "max_num_seqs": 7}, (7, 300)),
    ],
)
def test_a_step_is_as_large_as_the_device_likes(device, options, expected):
    memory = (24 if device.startswith("small") else 80) << 30
    size = resolve_batch_size(EngineConfig(**options), device.removeprefix("small "), memory)
    assert (size.max_num_seqs, size.max_num_batched_tokens) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")
def test_cores_that_this_process_may_not_use_are_not_counted() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_cores() == 1
        prepare_cpu(EngineConfig(dtype="float32"), None)
        assert Threads.count == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_cores() == min(len(allowed), quota_cores(CGROUP) or len(allowed))
    prepare_cpu(EngineConfig(dtype="float32"), None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max 100000\n", None),
        ("200000 100000\n", 2),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("nonsense\n", None),
        ("1 0\n", None),
    ],
)
def test_a_container_s_quota_counts_in_whole_cores(content: str, expected: int | None, tmp_path: Path) -> None:
    assert quota_cores(tmp_path) is None  # no such file
    (tmp_path / "cpu.max").write_text(content)
    assert quota_cores(tmp_path) == expected


def test_a_quota_below_the_cores_bounds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr("tabstop.device.CGROUP", tmp_path)
    assert num_cores() == 1
