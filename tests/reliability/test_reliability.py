"""The short forms of what tests/reliability does at length."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.reliability import cases, disk, fuzz, kills, loris, soak, stops, storms
from tests.reliability.server import Server, serving, write_model

NUM_DRAWN = 60  # requests; drawing is what costs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("reliability") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """One for all faults that a server survives; the last thing it does is to leave nothing."""
    with serving(model, "--num-front-ends", "2", *loris.LIMITS, *kills.TIMEOUT) as running:
        yield running
        assert running.stop() == 0
        running.assert_nothing_left()


def test_cancelled_streams_leave_nothing(server: Server) -> None:
    tally = storms.cancel_streams(server, 300)
    assert tally.kinds["left"] > 100 and tally.kinds["finished"] > 10, tally.kinds


def test_mixed_traffic_leaves_the_pool_as_it_was(server: Server) -> None:
    run = soak.Soak(server, rate=15, seconds=4)
    run.run()
    run.check()
    assert run.tally.kinds["finished"] > 20 and "memory" in run.report()


def test_mapped_files_have_their_room(server: Server) -> None:
    """On a full disk a hole in one kills who writes to it."""
    files = list(Path(server.scratch).rglob("*.db"))
    assert len(files) == 3 * len(server.front_ends)
    assert all(path.stat().st_blocks * 512 >= path.stat().st_size > 0 for path in files)


def test_clients_that_hold_connections_are_let_go(server: Server) -> None:
    _, tally = loris.besiege(server, num_connections=40, num_unread=2)
    assert tally.kinds["finished"] > 10, tally.kinds


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_front_end_cuts_its_own_connections_only(server: Server, number: signal.Signals) -> None:
    tally = kills.kill_front_ends(server, [number], seed=1)
    assert tally.kinds["finished"] > 10, tally.kinds
    assert ("gave no sign of life" in server.text) == (number is signal.SIGSTOP)


def test_a_server_that_stood_still_goes_on_as_it_was(server: Server) -> None:
    kills.stand_still(server, 1.2 * kills.ENGINE_TIMEOUT)


def test_odd_requests_get_no_5xx(model: Path) -> None:
    """Those drawn when cases.jsonl.xz was made, and a few drawn now."""
    with serving(model, *fuzz.OPTIONS) as server:
        replayed = fuzz.replay(server, cases.stored())
        drawn = fuzz.attack(server, NUM_DRAWN)
        assert server.stop() == 0
    for name, found in (("replayed", replayed), ("drawn now", drawn)):
        print(f"{name}: {found.num_cases} cases, {found.num_requests} requests, {found.num_with(200)} answered")
    assert replayed.num_cases >= cases.NUM_STORED and drawn.num_requests >= NUM_DRAWN
    assert replayed.num_with(200) > replayed.num_requests // 10 and drawn.num_with(200), replayed.statuses


@pytest.fixture(scope="module")
def description(server: Server) -> dict[str, Any]:
    return requests.get(f"{server.url}/openapi.json", timeout=60).json()


def test_replayed_requests_name_everything_that_is_described(description: dict[str, Any]) -> None:
    missing = cases.missing(description, cases.stored())
    assert missing == [], f"the API has changed since tests/reliability/cases.jsonl.xz was made: {cases.REMAKE}"
    assert cases.STORED.stat().st_size < 300_000


def test_what_the_api_gains_or_loses_is_noticed(description: dict[str, Any]) -> None:
    changed = copy.deepcopy(description)
    paths, schemas = changed["paths"], changed["components"]["schemas"]
    schemas["CompletionBody"]["properties"]["new_field"] = {"type": "integer"}
    schemas["MessageBody"]["properties"]["new_part"] = {"type": "integer"}
    paths["/v1/new"] = paths["/v1/tokenize"]
    del paths["/metrics"]
    assert set(cases.missing(changed, cases.stored())) == {
        "GET /metrics: is no more",
        "POST /v1/new: no case",
        "POST /v1/completions: new_field",
        *(f"POST {path}: .new_part" for path in ("/v1/chat/completions", "/apply-template", "/v1/tokenize")),
    }


@pytest.mark.parametrize(
    ("status", "content", "is_right"),
    [
        (200, b'data: {"choices": []}\n\ndata: [DONE]\n\n', True),
        (200, b'data: {"error": {"code": "deadline_exceeded", "message": "x"}}\n\n', True),
        (200, b'data: {"error": {"code": "internal_error", "message": "x"}}\n\n', False),
        (400, b'{"error": {"code": "invalid_request", "message": "x"}}', True),
        (400, b'{"detail": "x"}', False),
        (504, b'{"error": {"code": "deadline_exceeded", "message": "the deadline"}}', True),
        (504, b'{"error": {"code": "unavailable", "message": "x"}}', False),
        (500, b'{"error": {"code": "internal_error", "message": "x"}}', False),
    ],
)
def test_what_counts_as_wrong(status: int, content: bytes, is_right: bool) -> None:
    assert (fuzz.judged(status, content) == "") is is_right


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_engine_ends_every_stream_once_and_the_server_with_70(model: Path, number: signal.Signals) -> None:
    tally, _ = kills.kill_engine(model, seed=1, number=number)
    assert tally.kinds["finished"] and tally.kinds["error"], tally.kinds


@pytest.mark.parametrize("kind", ["full"])
def test_without_room_for_logs_it_serves_and_ends_as_ever(model: Path, kind: str) -> None:
    tally = disk.serve_without_logs(model, kind)
    assert tally.kinds["finished"] >= 30


@pytest.mark.parametrize("seed", range(3))
def test_told_to_stop_under_load_every_request_ends_once(model: Path, seed: int) -> None:
    tally, _ = stops.stop(model, seed)
    assert tally.kinds["finished"], tally.kinds
    assert any(end.kind == "error" and end.status == 200 for end in tally.ends), "no stream was open at the end"
