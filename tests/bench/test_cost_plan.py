"""Prices and plans on numbers that can be worked out by hand."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tabstop.bench.cost import (
    CostQuestion,
    Mix,
    book_price,
    capacity_of,
    cost_figures,
    mixes_of,
    parse_price,
    read_book,
    split_by_kind,
    utilization_curve,
)
from tabstop.bench.metrics import Slo, summarize
from tabstop.bench.plan import (
    ReplicaModel,
    check_range,
    fewest_replicas,
    fit,
    fit_prefill,
    make_plan,
    poisson_like,
    replay,
)
from tabstop.bench.records import Chunk, Record
from tabstop.bench.report import BenchReport, Endpoints, RunSection
from tabstop.bench.run import RunSetup
from tabstop.bench.statistics import percentile
from tabstop.bench.workloads.trace import Trace, read_trace
from tabstop.errors import InputError

TODAY = datetime.date(2026, 11, 23)
MODEL = ReplicaModel(
    prefill_start=0.0,
    prefill_rate=20_000,
    decode_base=0.005,
    decode_slope=0.0001,
    max_running=64,
    max_prompt=8000,
)


def record(index: int, prompt: int = 100, output: int = 10, outcome: str = "ok") -> Record:
    """Ten a second; first token after 0.1 s + prompt / 1000, then 20 ms a token."""
    first = index / 10 + 0.1 + prompt / 1000
    chunks = [Chunk(first + 0.02 * i, 1, 1) for i in range(output)]
    return Record(
        session=index,
        intended=index / 10,
        sent=index / 10,
        ended=chunks[-1].at,
        chunks=chunks,
        outcome=outcome,  # type: ignore[arg-type]
        prompt_tokens=prompt,
        completion_tokens=output,
        counted_tokens=output,
    )


def report(records: list[Record], joules: float | None = None) -> BenchReport:
    endpoint = Endpoints(url="http://x", dialect="tgi", model="m")
    run = RunSection(
        label="x",
        endpoint=endpoint,
        summary=summarize(records),
        health=[],
        lag_p50=0.0,
        lag_p99=0.0,
        invalid=[],
        joules=joules,
    )
    setup = RunSetup()
    return BenchReport(kind="run", created="2026-11-23", command=[], environment={}, setup=setup, runs=[run])


def figures(question: CostQuestion, **options: object) -> dict[str, float | None]:
    records = [record(i) for i in range(200)]
    found = cost_figures([report(records, **options)], question)  # type: ignore[arg-type]
    assert all(figure.source for figure in found)
    return {figure.name: figure.value for figure in found}


def test_a_token_costs_the_hour_divided_by_its_tokens() -> None:
    price = parse_price("3.60/hour", 1, TODAY)
    found = figures(CostQuestion(price=price, utilization=0.25, acceptance=0.5))
    whole = found["output tokens, all cost on them, at capacity"]
    assert whole == pytest.approx(10.0, rel=0.03)  # $0.001 a second / 100 tokens a second
    assert found["output tokens, all cost on them, at 25 % use"] == pytest.approx(4 * (whole or 0))
    assert found["request"] == pytest.approx(0.001 / 10 / 0.25, rel=0.05)
    assert found["accepted completion"] == pytest.approx(2 * (found["request"] or 0))


def test_break_even_counts_both_kinds_of_tokens() -> None:
    question = CostQuestion(price=parse_price("3.60", 1, TODAY), api_prices={"input": 1.0, "output": 2.0})
    found = figures(question)  # 1000 in and 100 out a second: the API costs $0.0012 a second, we $0.001
    assert found["utilisation over which this server is cheaper than the API"] == pytest.approx(1 / 1.2, rel=0.05)


def test_energy_is_absent_without_a_counter() -> None:
    question = CostQuestion(price=parse_price("1", 1, TODAY), tariff=0.2)
    assert figures(question)["energy"] is None
    found = figures(question, joules=4000.0)
    assert found["energy"] == pytest.approx(2.0)
    assert found["electricity of output tokens"] == pytest.approx(2e6 / 3.6e6 * 0.2)


def mix(uncached: float, cached: float, output: float) -> Mix:
    """Rates at which a device is just busy, if the three kinds cost 10, 1 and 100 microseconds."""
    busy = (10 * uncached + cached + 100 * output) * 1e-6
    return Mix(
        label="",
        uncached=uncached / busy,
        cached=cached / busy,
        output=output / busy,
        requests=1,
        kind="saturated",
    )


def test_four_mixes_split_the_price() -> None:
    mixes = [mix(100, 0, 1), mix(10, 0, 10), mix(1, 0, 50), mix(50, 900, 5), mix(10, 400, 1)]
    split = split_by_kind(mixes)
    assert not isinstance(split, str)
    assert split[0] == pytest.approx(np.array([10, 1, 100]) * 1e-6, rel=1e-3)


def test_capacity_is_what_met_the_slo_before_what_saturates() -> None:
    saturated = mix(1, 0, 10)
    slo = msgspec.structs.replace(saturated, output=saturated.output / 2, kind="slo")
    load = msgspec.structs.replace(saturated, output=saturated.output * 2, kind="load")
    assert capacity_of([load, saturated, slo]) is slo
    assert capacity_of([load, saturated]) is saturated


def test_mixes_that_are_too_few_or_alike_are_not_split() -> None:
    assert "at least 4" in str(split_by_kind([mix(1, 0, 1)] * 3))
    assert "too alike" in str(split_by_kind([mix(1, 0, 1 + i / 1e4) for i in range(5)]))


def test_prices_are_read_and_dated() -> None:
    assert parse_price("$4.10/gpu-hour", 8, TODAY).hourly == pytest.approx(32.8)
    assert book_price("aws/p4d.24xlarge", 1).hourly == pytest.approx(32.77 / 8)
    assert all(isinstance(entry["date"], datetime.date) and entry["source"] for entry in read_book())
    assert book_price("h200").age(datetime.date(2027, 3, 1)) > 90
    for bad in ("cheap", "-1", "4/day"):
        with pytest.raises(InputError, match="cannot read --price"):
            parse_price(bad, 1, TODAY)
    with pytest.raises(InputError, match="no price for 'abacus'"):
        book_price("abacus")


def test_a_broken_price_book_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "book.toml").write_text("[[price]]\nname = 'x'\n")
    with pytest.raises(InputError, match="not a price book"):
        read_book(tmp_path / "book.toml")


def test_idle_time_is_paid() -> None:
    found = cost_figures([report([record(i) for i in range(100)])], CostQuestion(price=parse_price("1", 1, TODAY)))
    curve = dict(utilization_curve(found))
    assert curve[0.05] == pytest.approx(20 * curve[1.0])
    assert mixes_of(report([record(i, outcome="error") for i in range(30)])) != []


def test_a_replay_of_the_real_trace_needs_three_times_what_poisson_says() -> None:
    trace = read_trace("azure-code")
    p99 = {n: percentile(replay(trace, MODEL, n).ttft, 0.99) for n in (1, 2, 3, 4, 6)}
    assert p99 == pytest.approx({1: 31.8, 2: 10.9, 3: 4.5, 4: 2.0, 6: 0.37}, rel=0.02)
    slo = Slo(ttft=0.5, tpot=0.05)
    assert fewest_replicas(trace, MODEL, slo, 0.99) == 6
    assert fewest_replicas(poisson_like(trace, np.random.default_rng(0)), MODEL, slo, 0.99) == 2


def test_a_plan_has_an_interval_around_its_answer() -> None:
    plan = make_plan(read_trace("azure-code").part(0, 3000), MODEL, Slo(ttft=0.5))
    assert plan.low <= plan.replicas <= plan.high and plan.poisson_replicas < plan.replicas
    assert plan.ttft <= 0.5 and [n for n, _, _ in plan.table] == sorted(n for n, _, _ in plan.table)


def test_decoding_is_shared_and_capped() -> None:
    """Four equal requests at once, two at a time: 10 tokens of 6 ms, then the other two."""
    model = msgspec.structs.replace(MODEL, prefill_rate=1e9, decode_base=0.004, decode_slope=0.001, max_running=2)
    trace = Trace(np.zeros(4), np.full(4, 10), np.full(4, 11))
    tpot = sorted(replay(trace, model, 1).tpot)
    assert tpot == pytest.approx([0.006, 0.006, 0.012, 0.012], rel=1e-3)


def test_a_plan_refuses_what_was_not_measured() -> None:
    trace = read_trace("azure-code")
    with pytest.raises(InputError, match=r"prompts of up to 74\d\d tokens, the run measured up to 512"):
        check_range(trace, msgspec.structs.replace(MODEL, max_prompt=512))
    with pytest.raises(InputError, match="one request at a time"):
        check_range(trace, msgspec.structs.replace(MODEL, max_running=1))
    with pytest.raises(InputError, match="no number of replicas"):
        fewest_replicas(trace.part(0, 200), MODEL, Slo(ttft=0.001), 0.99)


def test_a_replica_is_fitted_from_records() -> None:
    records = [record(i, prompt=100 + 40 * (i % 20)) for i in range(200)]
    found = fit_prefill(records)
    assert found is not None and found == pytest.approx((0.1, 1000), rel=0.02)
    model = fit(report(records), records)
    assert (model.max_prompt, model.decode_slope) == (860, 0.0)
    assert model.decode_base == pytest.approx(0.02)
    assert fit_prefill([record(i) for i in range(200)]) is None  # one length tells no rate
