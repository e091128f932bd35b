"""Room for files that are mapped: all of it, or none is made."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tabstop.api.ceilings import Counts
from tabstop.front_end import METRICS_FILES, share_metrics
from tabstop.keys import Key
from tabstop.mapped import make_reserved, reserve


@contextmanager
def no_room() -> Iterator[None]:
    """No file may be longer than a few bytes, as on a disk that is full: not even pytest's own log, so be short."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_stands_in_a_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with path.open("r+b") as file:
        reserve(file.fileno(), 10_000)
        reserve(file.fileno(), 5_000)
    assert path.read_bytes() == b"abc" + bytes(9_997)
    assert path.stat().st_blocks * 512 >= 10_000


def test_all_or_none(tmp_path: Path) -> None:
    with no_room(), pytest.raises(OSError):
        make_reserved([tmp_path / "a", tmp_path / "b"], 1000)
    assert not list(tmp_path.iterdir())


def test_without_room_metrics_are_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    with caplog.at_level(logging.WARNING), no_room():
        share_metrics(tmp_path / "metrics")
    assert "no room for metrics" in caplog.text
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ and not list((tmp_path / "metrics").iterdir())


def test_with_room_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")  # given back at the end
    share_metrics(tmp_path)
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_{os.getpid()}.db" for name in METRICS_FILES}


def test_without_room_a_key_is_counted_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), no_room():
        counts = Counts(tmp_path).of(Key(name="a", sha256="0" * 64))
    assert "counts alone" in caplog.text and counts is not None
