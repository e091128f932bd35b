"""Bytes that change, and who counts how long they do not."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from pathlib import Path

import pytest

from tabstop import heartbeats, mapped
from tabstop.heartbeats import Heartbeats, Silence, beat, open_heartbeats, wait_silent

PATIENCE = 20.0  # seconds; only a hang reaches it


def test_both_sides_see_the_same_bytes(tmp_path: Path) -> None:
    front_end, supervisor = Heartbeats(tmp_path / "beats", 2), Heartbeats(tmp_path / "beats", 2)
    seen = []
    for _ in range(600):
        front_end.beat(1)
        seen.append(supervisor.at(1))
    assert heartbeats.NEVER not in seen and all(one != other for one, other in pairwise(seen))
    assert supervisor.at(0) == heartbeats.NEVER
    supervisor.forget(1)
    assert front_end.at(1) == heartbeats.NEVER


def test_silence_begins_with_the_last_beat_and_not_before_the_first() -> None:
    silence = Silence()
    heard = [silence.after(byte) for byte in (0, 0, 0, 7, 7, 7, 8, 8, 0, 0)]
    assert heard == [0, 0, 0, 0, 1, 2, 0, 1, 0, 0]


async def test_one_that_beats_is_never_silent_and_one_that_stops_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.01)
    cells = open_heartbeats(str(tmp_path), 1)
    beating = asyncio.create_task(beat(cells, 0))
    waiting = asyncio.create_task(wait_silent(cells, 0, 0.5))
    await asyncio.sleep(1)
    assert not waiting.done()
    beating.cancel()
    await asyncio.wait_for(waiting, PATIENCE)


async def test_without_room_nobody_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.01)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "reserve", refuse)
    with caplog.at_level(logging.WARNING):
        assert open_heartbeats(str(tmp_path), 1) is None
    assert "no room for heartbeats" in caplog.text
    await asyncio.wait_for(beat(None, 0), PATIENCE)
    waiting = asyncio.create_task(wait_silent(None, 0, 0.02))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    waiting.cancel()
