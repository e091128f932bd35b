"""The comparison's design and verdicts, the sweep's search, the tool's own test on recorded noise. Counts, no times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tabstop.bench import selftest
from tabstop.bench.client import Endpoint
from tabstop.bench.compare import Arm, CompareSpec, Comparison, compare, segment_metrics
from tabstop.bench.golden import Behaviour
from tabstop.bench.metrics import Slo
from tabstop.bench.records import Chunk, Record
from tabstop.bench.report import ComparisonSection, comparison_section
from tabstop.bench.run import LoadSpec, RunSetup
from tabstop.bench.selftest import NoiseRecording, golden_endpoint, golden_process, noise_verdicts
from tabstop.bench.sweep import SloWatch, Sweep, SweepSpec
from tabstop.bench.workers import WorkerPool
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.prompts import IdMaker, LooseMaker
from tabstop.errors import ConfigError

NOISE = Path(__file__).parent / "data" / "recorded_noise.json"
RECORDING = msgspec.json.decode(NOISE.read_bytes(), type=NoiseRecording)
WORKLOAD = WorkloadSpec(num_requests=6, input_tokens="8", output_tokens="4")
SETUP = RunSetup(workload=WORKLOAD, load=LoadSpec(concurrency=3))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with golden_process(Behaviour(ttft=0.01, rate=1000)) as address:
        yield address


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as workers:
        yield workers


def test_equal_endpoints_are_called_equal_on_recorded_noise() -> None:
    found = noise_verdicts(RECORDING, 1.0, 200)
    assert len(found) >= 6 and max(found.values()) <= 15, found


def test_a_ten_percent_slow_down_is_found_on_recorded_noise() -> None:
    found = noise_verdicts(RECORDING, 1.1, 200)
    assert min(found.values()) >= 180, found


def arm(label: str, endpoint: Endpoint, salt: int = 0) -> Arm:
    return Arm(label=label, maker=IdMaker(), enter=lambda: endpoint, salt=salt)


seeds = itertools.count(1)  # the module shares one server, which remembers every prompt


def play(pool: WorkerPool, arms: list[Arm], **changes: object) -> Comparison:
    setup = msgspec.structs.replace(SETUP, workload=msgspec.structs.replace(WORKLOAD, seed=next(seeds)))
    spec = CompareSpec(**{"num_blocks": 4, "num_aa_blocks": 0} | changes)  # type: ignore[arg-type]
    return compare(pool, arms, setup, spec)


def test_blocks_alternate_and_both_sides_get_the_same_lengths(url: str, pool: WorkerPool) -> None:
    asked: list[str] = []

    def entering(label: str) -> Callable[[], Endpoint]:
        def enter() -> Endpoint:
            asked.append(label)
            return golden_endpoint(url)

        return enter

    arms = [Arm(label=x, maker=IdMaker(), enter=entering(x), salt=i) for i, x in enumerate("AB")]
    comparison = play(pool, arms, num_aa_blocks=1)
    assert asked[:4] == ["A"] * 4  # the A/A block
    blocks = ["".join(asked[i : i + 4]) for i in range(4, len(asked), 4)]
    assert len(blocks) == 4 and set(blocks) <= {"ABBA", "BAAB"}
    first, second = (o.summary.tokens for o in comparison.outcomes)
    assert (first.prompt, first.output_counted) == (second.prompt, second.output_counted)
    assert all(check.passed for check in comparison.pairs[0].gate), comparison.pairs[0].gate


def test_prompts_are_never_seen_twice_even_by_one_server(url: str, pool: WorkerPool) -> None:
    comparison = play(pool, [arm("A", golden_endpoint(url)), arm("B", golden_endpoint(url), salt=1)])
    assert [outcome.summary.tokens.cached for outcome in comparison.outcomes] == [0, 0]


def test_without_the_salt_one_server_would_answer_from_its_cache(url: str, pool: WorkerPool) -> None:
    comparison = play(pool, [arm("A", golden_endpoint(url)), arm("B", golden_endpoint(url))])
    assert sum(outcome.summary.tokens.cached or 0 for outcome in comparison.outcomes) > 0


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"ignore_max_tokens": True}, "output tokens"),
        ({"fault": "error-event", "fault_share": 0.3}, "errors of the candidate"),
    ],
)
def test_unequal_work_has_no_verdict(url: str, pool: WorkerPool, behaviour: dict[str, object], reason: str) -> None:
    comparison = play(pool, [arm("A", golden_endpoint(url)), arm("B", golden_endpoint(url, **behaviour), salt=1)])
    pair = comparison.pairs[0]
    assert reason in pair.refused
    assert {judgement.verdict for judgement in pair.judgements} <= {"not comparable"}


def test_blocks_that_failures_reach_survive_the_report(url: str, pool: WorkerPool, tmp_path: Path) -> None:
    """Half of the candidate's requests fail: its p90 latencies are infinite, and JSON knows no infinity."""
    failing = golden_endpoint(url, fault="http-500", fault_share=0.5)
    comparison = play(pool, [arm("A", golden_endpoint(url)), arm("B", failing, salt=1)])
    section = comparison_section(comparison)
    assert msgspec.json.decode(msgspec.json.encode(section), type=ComparisonSection) == section
    values = {blocks.metric: blocks.candidate for blocks in section.pairs[0].blocks}
    assert None in values["e2e_p90"] and None not in values["requests_per_s"]


def test_an_obvious_difference_is_found_through_sockets_in_three_arms(url: str, pool: WorkerPool) -> None:
    arms = [arm("A", golden_endpoint(url)), arm("same", golden_endpoint(url), salt=1)]
    arms.append(arm("slow", golden_endpoint(url, slow_down=4), salt=2))
    comparison = play(pool, arms, num_blocks=6)
    verdicts = {pair.candidate: {j.metric: j.verdict for j in pair.judgements} for pair in comparison.pairs}
    assert verdicts["slow"]["e2e_p50"] == verdicts["slow"]["output_tokens_per_s"] == "slower"
    assert set(comparison.labels) == {"A", "same", "slow"}


def test_too_few_blocks_are_refused(url: str, pool: WorkerPool) -> None:
    with pytest.raises(ConfigError, match="at least 4"):
        play(pool, [arm("A", golden_endpoint(url)), arm("B", golden_endpoint(url))], num_blocks=3)


def record(index: int, seconds: float) -> Record:
    chunks = [Chunk(index + seconds, 1, 1)]
    return Record(session=index, intended=index, sent=index, ended=index + seconds, chunks=chunks)


def test_segment_metrics_add_both_rounds() -> None:
    rounds = [[record(0, 1.0), record(1, 1.0)], [record(0, 3.0)]]
    metrics = segment_metrics(rounds, SETUP)
    assert metrics["e2e_p50"] == 1.0 and metrics["requests_per_s"] == pytest.approx(3 / (2.0 + 3.0))


def test_the_slo_watch_waits_for_slow_requests_and_for_the_least_time() -> None:
    watch = SloWatch(Slo(e2e=2.0), SweepSpec(percentile=0.9, min_duration=60.0))
    assert not any(watch.take(record(i, 1.0)) for i in range(1, 59))
    assert watch.num_decided == 0  # request 0 still runs: nothing may be concluded from the quick ones after it
    watch.take(record(0, 1.0))
    assert watch.num_decided == 59 and watch.is_met is None
    assert any(watch.take(record(i, 1.0)) for i in range(59, 120)) and watch.is_met is True


def test_the_slo_watch_gives_up_early() -> None:
    watch = SloWatch(Slo(e2e=2.0), SweepSpec(percentile=0.9))
    assert any(watch.take(record(i, 9.0)) for i in range(60)) and watch.is_met is False


def test_a_sweep_finds_a_capacity_between_two_rates(pool: WorkerPool) -> None:
    """Two slots of 40 ms serve 50 requests a second, so 200 cannot pass."""
    with golden_process(Behaviour(ttft=0.039, rate=1000, slots=2)) as url:
        setup = msgspec.structs.replace(SETUP, slo=Slo(ttft=1.0), warm_up_requests=0)
        setup = msgspec.structs.replace(setup, workload=msgspec.structs.replace(setup.workload, output_tokens="2"))
        spec = SweepSpec(percentile=0.9, min_duration=0.5, curve_requests=8, max_steps=3, saturating_concurrency=4)
        result = Sweep(pool, golden_endpoint(url), setup, spec, IdMaker()).run()
    assert result.met is None or result.met < 200
    assert [p.purpose for p in result.points[:8]] == ["saturation"] + ["curve"] * 7
    assert None in (result.met, result.missed) or result.missed > result.met  # type: ignore[operator]


def test_a_sweep_of_sessions_counts_sessions(pool: WorkerPool) -> None:
    with golden_process(Behaviour(ttft=0.004, rate=1000, slots=2)) as url:
        workload = WorkloadSpec(name="chat", output_tokens="2", num_turns=3, think_time=0.01, prefix_tokens=32)
        setup = RunSetup(workload=workload, slo=Slo(ttft=1.0), warm_up_requests=0)
        spec = SweepSpec(
            percentile=0.9,
            min_duration=0.5,
            max_requests=60,
            curve_requests=8,
            max_steps=2,
            saturating_concurrency=4,
        )
        result = Sweep(pool, golden_endpoint(url, "openai-chat"), setup, spec, LooseMaker()).run()
    saturation, *others = result.points
    assert (saturation.num_sessions, saturation.num_requests) == (32, 96)
    assert result.saturated_sessions_per_s == pytest.approx(result.saturated_requests_per_s / 3)
    assert {p.num_requests for p in others if p.purpose == "curve"} == {24}
    decided = [p for p in others if p.purpose == "search"]
    assert decided and all(p.num_sessions >= 22 for p in decided if p.is_met)  # what p90 at 99 % needs


def test_a_session_is_late_once_and_good_only_when_all_its_turns_were() -> None:
    watch = SloWatch(Slo(e2e=2.0), SweepSpec(percentile=0.5, confidence=0.9, min_duration=0.0))
    turns = [record(0, 1.0), record(0, 9.0), record(0, 9.0), record(1, 1.0), record(1, 1.0)]
    for number, one in enumerate(turns):
        one.num_turns = 3
        watch.take(one)
        assert watch.num_decided == (number >= 2)
    assert (watch.num_over, watch.num_over_known) == (1, 1)
    watch.take(msgspec.structs.replace(turns[-1], ended=2.0))
    assert (watch.num_decided, watch.num_over) == (2, 1)


def test_the_selftests_accounting_is_exact(pool: WorkerPool) -> None:
    (check,) = selftest.check_accounts(pool, num_each=8)
    assert check.passed, check.measured


def test_the_selftests_clock_check_matches_every_token(pool: WorkerPool) -> None:
    checks = selftest.check_clocks(pool, num_streams=10, rate=20.0, seconds=0.5)
    assert [f"n = {n}" in check.measured for n, check in zip((10, 100, 90), checks, strict=True)] == [True] * 3


def test_recorded_noise_is_as_long_as_the_design() -> None:
    assert RECORDING.num_segments >= 400
    assert all(np.isfinite(values).all() and min(values) > 0 for values in map(np.array, RECORDING.metrics.values()))
