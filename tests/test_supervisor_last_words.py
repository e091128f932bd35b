"""When the engine is gone, the log names the requests that it had in hand: one of them may be why."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tabstop.engine import recorder
from tabstop.engine.recorder import MAX_REQUESTS, NUM_BYTES, Recorder
from tests.engine.stub_core import CRASH
from tests.test_supervisor import ENDLESS, PATIENCE, Server, model, num_running, start, until

assert model and start  # fixtures


def ask(server: Server, name: str, prompt: list[int], max_tokens: int) -> int:
    """The status of a whole answer."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"x-request-id": name}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE).status_code


def in_hand(errors: str) -> set[str]:
    """The request ids that the log's lines amount to."""
    found = re.search(r"it had these requests in hand .*: ([\d,-]+)$", errors, re.MULTILINE)
    assert found, errors
    suspects = set(found[1].split(","))
    lines = re.findall(r"answered request_id=(\S+) .*engine_ids=([\d,-]+)", errors)
    return {name for name, numbers in lines if suspects & set(numbers.split(","))}


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_log_names_what_the_engine_had_in_hand(start: Callable[..., Server], is_killed: bool) -> None:
    server = start(num_front_ends=1)
    assert ask(server, "before", [1, 2], 1) == 200
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask, server, "beside", [3, 4], ENDLESS)]
        until(lambda: num_running(server) == 1, "a running request")
        if is_killed:
            os.kill(server.engine.pid, signal.SIGKILL)
        else:
            running.append(pool.submit(ask, server, "killer", [CRASH, 1], 5))
        statuses = {future.result() for future in running}
    code, errors = server.end()
    assert code == 70 and statuses <= {500, 503}
    assert in_hand(errors) == ({"beside"} if is_killed else {"beside", "killer"})
    assert "def f" not in errors


def test_what_was_noted_last_is_read_in_whatever_state(tmp_path: Path) -> None:
    assert recorder.read(str(tmp_path)) == []
    made = Recorder(str(tmp_path))
    assert recorder.read(str(tmp_path)) == []
    for requests in ([(1, 2), (3, 1 << 40)], [(4, 5)], [], [(7, number) for number in range(MAX_REQUESTS + 9)]):
        made.note(requests)
        assert recorder.read(str(tmp_path)) == requests[:MAX_REQUESTS]
    path = tmp_path / recorder.FILE
    for nonsense in (b"", b"\xff" * NUM_BYTES, path.read_bytes()[:-1]):
        path.write_bytes(nonsense)
        assert recorder.read(str(tmp_path)) == []
