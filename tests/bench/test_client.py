"""Through real sockets: exact accounting in every dialect and style, both clocks, every way to fail."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator
from itertools import pairwise

import msgspec
import pytest

from tabstop.bench.client import Endpoint, request_id
from tabstop.bench.dialects import DIALECTS
from tabstop.bench.golden import STYLES, Behaviour, golden_tokenizer
from tabstop.bench.metrics import account, latency_samples
from tabstop.bench.records import Message, Record, Session, Turn
from tabstop.bench.run import verify
from tabstop.bench.selftest import golden_endpoint, golden_process, truth, wrong_accounts
from tabstop.bench.tokens import LocalTokenizer, resolve
from tabstop.bench.workers import LoadPlan, WorkerPool, split


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with golden_process(Behaviour(ttft=0.01, rate=1000)) as address:
        yield address


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as workers:
        yield workers


counter = iter(range(0, 10**9, 1000))  # request ids must not repeat within the module


def sessions(num: int, **turn: object) -> list[Session]:
    first = next(counter)
    values = {"text": " a b c", "max_tokens": 9, "num_prompt_tokens": 3} | turn
    return [Session(index=first + i, start=0.002 * i, turns=[Turn(**values)]) for i in range(num)]  # type: ignore[arg-type]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_accounting_is_exact(url: str, pool: WorkerPool, dialect: str, style: str) -> None:
    plan = LoadPlan(endpoint=golden_endpoint(url, dialect, style=style), sessions=sessions(12))
    records = pool.run(plan).records
    assert len(records) == 12
    assert wrong_accounts(records, truth(url)) == []
    assert {(r.completion_tokens, r.counted_tokens, r.prompt_tokens) for r in records} == {(9, 9, 3)}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_answer_in_one_body_has_an_end_and_no_first_token(url: str, pool: WorkerPool, dialect: str) -> None:
    records = pool.run(LoadPlan(endpoint=whole(golden_endpoint(url, dialect)), sessions=sessions(12))).records
    assert wrong_accounts(records, truth(url)) == []
    assert {(r.completion_tokens, r.counted_tokens, r.finish_reason) for r in records} == {(9, 9, "length")}
    assert all(len(r.chunks) == 1 and r.chunks[0].at <= r.ended for r in records)
    samples = latency_samples(records, from_sent=True)
    assert set(samples) == {"e2e", "completion"} and samples["e2e"].min() >= 0.01  # golden time, at the least


def whole(endpoint: Endpoint) -> Endpoint:
    return msgspec.structs.replace(endpoint, sampling=msgspec.structs.replace(endpoint.sampling, stream=False))


@pytest.mark.parametrize(
    ("fault", "message"),
    [("error-event", "golden fault"), ("garbage", "not openai-completions JSON"), ("http-500", "HTTP 500: golden")],
)
def test_each_fault_of_a_whole_answer_is_one_clear_error(url: str, pool: WorkerPool, fault: str, message: str) -> None:
    broken = whole(golden_endpoint(url, fault=fault, fault_share=1.0))
    records = pool.run(LoadPlan(endpoint=broken, sessions=sessions(4))).records
    assert {r.outcome for r in records} == {"error"} and all(message in r.error for r in records), records[0].error
    assert set(latency_samples(records, from_sent=True)) == {"e2e", "completion"}


def test_a_whole_answer_without_usage_is_not_counted_by_guessing(url: str, pool: WorkerPool) -> None:
    silent = whole(golden_endpoint(url, usage=False))
    records = pool.run(LoadPlan(endpoint=silent, sessions=sessions(2))).records
    assert {(r.outcome, resolve(r).count_source, r.counted_tokens) for r in records} == {("ok", "none", 0)}


def test_silent_answers_are_retokenised(url: str, pool: WorkerPool) -> None:
    silent = golden_endpoint(url, style="several", usage=False, running_usage=False)
    records = pool.run(LoadPlan(endpoint=silent, sessions=sessions(6))).records
    verify(records, LocalTokenizer(golden_tokenizer()).count)
    assert {r.retokenized_tokens for r in records} == {9}
    tokens = account([resolve(resolve(r)) for r in records])  # a second look must not call guesses the server's count
    assert tokens.count_sources == {"chunks": 6}
    assert tokens.num_retokenized == tokens.num_retokenized_mismatches == 6  # several tokens came in each chunk


def test_request_names_are_uuids_and_differ() -> None:
    records = [Record(session=s, turn=t, intended=0, sent=0, ended=0) for s in (0, 1, 2**40) for t in (0, 1, 500)]
    names = {request_id(r) for r in records}
    assert len(names) == 9 and all(str(uuid.UUID(name)) == name for name in names)


def test_a_silent_server_is_counted_by_a_tokenizer(url: str, pool: WorkerPool) -> None:
    silent = golden_endpoint(url, style="mixed", usage=False, running_usage=False)
    records = pool.run(LoadPlan(endpoint=silent, sessions=sessions(30))).records
    assert wrong_accounts(records, truth(url), LocalTokenizer(golden_tokenizer())) == []
    assert {r.count_source for r in records} == {"tokenizer"}


def test_token_ids_and_cached_tokens_are_reported(url: str, pool: WorkerPool) -> None:
    for expected in (0, 5):
        plan = LoadPlan(endpoint=golden_endpoint(url), sessions=sessions(1, ids=[7, 8, 9, 10, 11], text=""))
        (record,) = pool.run(plan).records
        assert (record.prompt_tokens, record.cached_tokens) == (5, expected)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error-event", "error inside the stream: golden fault"),
        ("cut", "connection lost inside the answer"),
        ("garbage", "broken SSE"),
        ("http-500", "HTTP 500: golden fault"),
        ("no-end", "without a finish reason"),
    ],
)
def test_each_fault_is_one_clear_error(url: str, pool: WorkerPool, fault: str, message: str) -> None:
    broken = golden_endpoint(url, fault=fault, fault_share=1.0)
    records = pool.run(LoadPlan(endpoint=broken, sessions=sessions(4))).records
    assert [r.outcome for r in records] == ["error"] * 4
    assert all(message in r.error for r in records), records[0].error


def test_a_wrong_model_and_an_unreachable_server_are_errors(url: str, pool: WorkerPool) -> None:
    good = golden_endpoint(url)
    wrong_model = msgspec.structs.replace(good, sampling=msgspec.structs.replace(good.sampling, model="gpt"))
    (record,) = pool.run(LoadPlan(endpoint=wrong_model, sessions=sessions(1))).records
    assert record.error == "HTTP 404: the model 'gpt' does not exist"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = golden_endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}")
        (record,) = pool.run(LoadPlan(endpoint=nowhere, sessions=sessions(1))).records
    assert record.outcome == "error" and "connect" in record.error.lower()


def test_a_slow_server_times_out(url: str, pool: WorkerPool) -> None:
    slow = msgspec.structs.replace(golden_endpoint(url, ttft=5), timeout=0.2)
    (record,) = pool.run(LoadPlan(endpoint=slow, sessions=sessions(1))).records
    assert (record.outcome, record.error) == ("timeout", "no end after 0.2 s")


def test_the_client_hangs_up_when_told_to(url: str, pool: WorkerPool) -> None:
    (record,) = pool.run(
        LoadPlan(endpoint=golden_endpoint(url, rate=5), sessions=sessions(1, cancel_after=0.3))
    ).records
    assert record.outcome == "cancelled" and 0 < len(record.chunks) < 9


def test_keystrokes_supersede_what_still_runs(url: str, pool: WorkerPool) -> None:
    turns = [Turn(text=f" k{i}", max_tokens=50, delay=0.05, supersedes=True) for i in range(3)]
    plan = LoadPlan(
        endpoint=golden_endpoint(url, rate=100), sessions=[Session(index=next(counter), start=0.0, turns=turns)]
    )
    records = sorted(pool.run(plan).records, key=lambda r: r.turn)
    assert [r.outcome for r in records] == ["superseded", "superseded", "ok"]
    assert [round(r.intended, 6) for r in records] == [0.0, 0.05, 0.1]


def test_a_conversation_carries_the_servers_answer(url: str, pool: WorkerPool) -> None:
    first = Turn(messages=[Message("user", "one two")], max_tokens=4)
    second = Turn(messages=[*first.messages, Message("user", "three")], max_tokens=4, delay=0.01, carries_answer=True)
    plan = LoadPlan(
        endpoint=golden_endpoint(url, "openai-chat"),
        sessions=[Session(index=next(counter), start=0.0, turns=[first, second])],
    )
    records = sorted(pool.run(plan).records, key=lambda r: r.turn)
    assert [r.prompt_tokens for r in records] == [2, 2 + 4 + 1]
    assert records[1].intended >= records[0].ended + 0.01


def test_a_closed_loop_keeps_its_number_of_slots(url: str, pool: WorkerPool) -> None:
    plan = LoadPlan(endpoint=golden_endpoint(url, ttft=0.02), sessions=sessions(40), concurrency=5, ramp=0.05)
    result = pool.run(plan)
    events = sorted([(r.sent, 1) for r in result.records] + [(r.ended, -1) for r in result.records])
    in_flight, most = 0, 0
    for _, change in events:
        in_flight += change
        most = max(most, in_flight)
    assert (len(result.records), most) == (40, 5)
    assert len(result.health) == 2


def test_slots_rest_between_requests(url: str, pool: WorkerPool) -> None:
    plan = LoadPlan(endpoint=golden_endpoint(url), sessions=sessions(6), concurrency=1, rest=0.05)
    records = sorted(pool.run(plan).records, key=lambda r: r.sent)
    assert len(records) == 6
    assert all(later.intended > earlier.ended for earlier, later in pairwise(records))


def test_a_stalled_server_does_not_hide_behind_the_send_time(url: str, pool: WorkerPool) -> None:
    """Open loop: sends keep their schedule, so requests behind a full server wait on the clock that counts."""
    plan = LoadPlan(endpoint=golden_endpoint(url, ttft=0.3), sessions=sessions(20))
    records: list[Record] = sorted(pool.run(plan).records, key=lambda r: r.intended)
    assert [round(r.intended, 3) for r in records] == [round(0.002 * i, 3) for i in range(20)]
    assert all(r.sent < records[0].ended for r in records)
    assert all(resolve(r).counted_tokens == 9 for r in records)


@pytest.mark.parametrize(
    ("num_sessions", "slots", "workers"), [(1024, 256, 6), (10, 8, 3), (5, 2, 4), (7, 7, 7), (3, 8, 2)]
)
def test_no_slot_of_a_closed_loop_serves_two_sessions_more_than_another(
    num_sessions: int, slots: int, workers: int
) -> None:
    some = [Session(index=n, turns=[]) for n in range(num_sessions)]
    jobs = split(LoadPlan(endpoint=Endpoint(url="http://localhost"), sessions=some, concurrency=slots), workers)
    assert sorted(session.index for job in jobs for session in job.sessions) == list(range(num_sessions))
    assert sum(job.concurrency or 0 for job in jobs) == slots
    rounds = {-(-len(job.sessions) // job.concurrency) for job in jobs if job.concurrency}
    assert max(rounds) == -(-num_sessions // slots)
    assert not any(job.sessions for job in jobs if not job.concurrency)
