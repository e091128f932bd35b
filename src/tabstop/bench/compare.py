"""The paired comparison: blocks in randomised ABBA order, an A/A run first, the equal-work gate, a verdict per metric.

A block is two rounds; in the first the endpoints come in random order, in the second in reverse (A B B A), so that any
linear drift of the machine falls out of the block's ratio. All endpoints get the same prompts and send times; an
endpoint asked twice in one block (A/A, or two names of one server) gets other prompts of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from tabstop.bench.client import Endpoint
from tabstop.bench.gate import GateCheck, GateLimits, equal_work
from tabstop.bench.metrics import counts_for_latency, latency_samples, meets
from tabstop.bench.records import ClientHealth, Record
from tabstop.bench.run import Outcome, Report, RunSetup, conclude, execute
from tabstop.bench.statistics import Judgement, MetricBlocks, judge, percentile
from tabstop.bench.workers import RunResult, WorkerPool
from tabstop.bench.workloads.prompts import PromptMaker
from tabstop.errors import ConfigError, InputError

AA_BLOCK = 1_000_000  # blocks of the A/A run are numbered from here, so their prompts are their own
AGAIN_SALT = 77


class CompareSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How many blocks, and when a difference counts."""

    num_blocks: int = 10
    num_aa_blocks: int = 5  # 0: no A/A run
    alpha: float = 0.05
    minimum_effect: float = 0.01
    limits: GateLimits = GateLimits()
    seed: int = 0


class BlockValues(msgspec.Struct, frozen=True, kw_only=True):
    """One metric's value in each block, as it is reported. None: infinite, because failures reach it."""

    metric: str
    higher_is_better: bool
    baseline: list[float | None]
    candidate: list[float | None]
    aa_first: list[float | None] = []
    aa_second: list[float | None] = []


class Pair(msgspec.Struct, kw_only=True):
    """One candidate against the baseline."""

    baseline: str
    candidate: str
    gate: list[GateCheck]
    judgements: list[Judgement]
    blocks: list[BlockValues]
    refused: str = ""  # why every verdict is "not comparable"; empty if none was withheld


class Comparison(msgspec.Struct, kw_only=True):
    """All pairs, with the records behind them pooled per endpoint."""

    labels: list[str]
    pairs: list[Pair]
    outcomes: list[Outcome]  # of each endpoint that was measured, over all its segments laid end to end
    aa_judgements: list[Judgement]
    order: list[list[int]]  # the endpoints in the order in which each block asked them
    is_interrupted: bool = False
    failure: str = ""  # why it ended early, if that was not the user's wish


class Arm(msgspec.Struct, kw_only=True):
    """An endpoint ready to be asked. `enter` makes its server run and gives the endpoint's present URL."""

    label: str
    maker: PromptMaker
    enter: Callable[[], Endpoint]
    salt: int = 0


def check_blocks(num_blocks: int) -> None:
    """Raises ConfigError for too few to say anything."""
    if num_blocks < 4:
        raise ConfigError(f"{num_blocks} blocks cannot carry a verdict: give at least 4, better 10")


def compare(
    pool: WorkerPool,
    arms: list[Arm],
    setup: RunSetup,
    spec: CompareSpec,
    report: Callable[[str, int, int], Report | None] = lambda label, done, total: None,
) -> Comparison:
    """Runs A/A blocks, then all blocks, and judges. `report(label, done, total)` gives each segment's callback."""
    check_blocks(spec.num_blocks)
    runner = _Runner(pool, setup, report, 4 * spec.num_aa_blocks + 2 * len(arms) * spec.num_blocks)
    rng = np.random.default_rng([spec.seed, 4])
    again = msgspec.structs.replace(arms[0], salt=AGAIN_SALT)
    runner.play([arms[0], again], spec.num_aa_blocks, AA_BLOCK, rng)
    aa_blocks, runner.blocks = runner.blocks, []
    runner.order.clear()
    runner.play(arms, spec.num_blocks, 0, rng)
    return _conclude(runner, arms, aa_blocks, setup, spec)


class _Runner:
    """Plays blocks; keeps each block's segments per arm."""

    def __init__(
        self,
        pool: WorkerPool,
        setup: RunSetup,
        report: Callable[[str, int, int], Report | None],
        num_segments: int,
    ) -> None:
        self.pool = pool
        self.setup = setup
        self.report = report
        self.num_segments = num_segments
        self.num_done = 0
        self.blocks: list[list[list[Outcome]]] = []  # [block][arm][round]
        self.order: list[list[int]] = []
        self.measured: dict[str, list[Outcome]] = {}  # all segments by label, those of incomplete blocks too
        self.is_interrupted = False
        self.failure = ""

    def play(self, arms: list[Arm], num_blocks: int, first: int, rng: np.random.Generator) -> None:
        for block in range(num_blocks):
            if self.is_interrupted:
                return
            order = [int(i) for i in rng.permutation(len(arms))]
            order += order[::-1]
            block_segments: list[list[Outcome]] = [[] for _ in arms]
            for position, number in enumerate(order):
                segment = 2 * (first + block) + (position >= len(arms))
                try:
                    block_segments[number].append(self._segment(arms[number], segment))
                except KeyboardInterrupt:
                    self.is_interrupted = True
                except InputError as error:  # a server died: hours of blocks must not die with it
                    self.is_interrupted, self.failure = True, error.message
                if self.is_interrupted:
                    return  # an incomplete block is no block: no verdict counts it
            self.blocks.append(block_segments)
            self.order.append(order)

    def _segment(self, arm: Arm, segment: int) -> Outcome:
        workload = msgspec.structs.replace(self.setup.workload, block=segment, salt=arm.salt)
        setup = msgspec.structs.replace(self.setup, workload=workload)
        outcome = execute(
            self.pool, arm.enter(), setup, arm.maker, self.report(arm.label, self.num_done, self.num_segments)
        )
        self.num_done += 1
        self.measured.setdefault(arm.label, []).append(outcome)
        self.is_interrupted = self.is_interrupted or outcome.is_interrupted
        return outcome


def block_values(blocks: list[list[list[Outcome]]], arm: int, setup: RunSetup) -> dict[str, list[float]]:
    """Each metric's value per block, over both rounds of the arm; only metrics that every block has."""
    values: dict[str, list[float]] = {}
    for block in blocks:
        metrics = segment_metrics([outcome.records for outcome in block[arm]], setup)
        for name, value in (metrics | energy_metrics(block[arm])).items():
            values.setdefault(name, []).append(value)
    return {name: series for name, series in values.items() if len(series) == len(blocks)}


def segment_metrics(rounds: Sequence[Sequence[Record]], setup: RunSetup) -> dict[str, float]:
    """One block's numbers for one endpoint. Latencies pool both rounds; rates add both rounds' work and time."""
    records = [record for one_round in rounds for record in one_round]
    samples = latency_samples(records, from_sent=setup.load.mode == "closed")
    values: dict[str, float] = {}
    for name, levels in (("ttft", (0.5, 0.9)), ("tpot", (0.5,)), ("e2e", (0.5, 0.9)), ("completion", (0.5,))):
        if name in samples and (name != "completion" or len(samples[name]) < len(samples["e2e"])):
            values |= {f"{name}_p{100 * q:g}": percentile(samples[name], q) for q in levels}
    if "itl" in samples:
        values["itl_mean"] = float(samples["itl"].mean())
    seconds = sum(max(r.ended for r in one) - min(r.sent for r in one) for one in rounds if one)
    done = [record for record in records if record.outcome == "ok"]
    if seconds > 0 and done:
        values["output_tokens_per_s"] = sum(r.num_tokens for r in done) / seconds
        values["requests_per_s"] = len(done) / seconds
        if setup.slo is not None:
            relevant = [record for record in records if counts_for_latency(record)]
            values["goodput"] = sum(meets(record, setup.slo) for record in relevant) / seconds
    return values


def energy_metrics(rounds: Sequence[Outcome]) -> dict[str, float]:
    """Joules a token of one block; nothing where no card was read."""
    joules = [outcome.joules for outcome in rounds if outcome.joules is not None]
    num_tokens = sum(r.num_tokens for outcome in rounds for r in outcome.records if r.outcome == "ok")
    if len(joules) < len(rounds) or not sum(joules) or not num_tokens:
        return {}
    return {"joules_per_output_token": sum(joules) / num_tokens}


def is_higher_better(metric: str) -> bool:
    return metric.endswith("_per_s") or metric == "goodput"


def _conclude(
    runner: _Runner, arms: list[Arm], aa_blocks: list[list[list[Outcome]]], setup: RunSetup, spec: CompareSpec
) -> Comparison:
    if not runner.blocks:
        return _without_blocks(runner, setup)
    outcomes = [_joined([block[arm] for block in runner.blocks], setup) for arm in range(len(arms))]
    aa = [block_values(aa_blocks, arm, setup) if aa_blocks else {} for arm in (0, 1)]
    aa_judgements: list[Judgement] = []
    if len(aa_blocks) >= 4:
        shared = [MetricBlocks(m, is_higher_better(m), v, aa[1][m]) for m, v in aa[0].items() if m in aa[1]]
        aa_judgements = judge(shared, spec.seed, spec.alpha, spec.minimum_effect)
    values = [block_values(runner.blocks, arm, setup) for arm in range(len(arms))]
    pairs = []
    for arm in range(1, len(arms)):
        blocks = [
            MetricBlocks(m, is_higher_better(m), values[0][m], values[arm][m], aa[0].get(m, []), aa[1].get(m, []))
            for m in values[0]
            if m in values[arm]
        ]
        gate = equal_work(outcomes[0].records, outcomes[arm].records, spec.limits)
        judgements = judge(blocks, spec.seed, spec.alpha, spec.minimum_effect)
        pair = Pair(
            baseline=arms[0].label,
            candidate=arms[arm].label,
            gate=gate,
            judgements=judgements,
            blocks=[reported(metric) for metric in blocks],
        )
        pairs.append(_withheld(pair, _refusal(gate, aa_judgements)))
    return Comparison(
        labels=[arm.label for arm in arms],
        pairs=pairs,
        outcomes=outcomes,
        aa_judgements=aa_judgements,
        order=runner.order,
        is_interrupted=runner.is_interrupted,
        failure=runner.failure,
    )


def reported(blocks: MetricBlocks) -> BlockValues:
    """JSON has no infinity."""

    def finite(values: list[float]) -> list[float | None]:
        return [value if math.isfinite(value) else None for value in values]

    return BlockValues(
        metric=blocks.metric,
        higher_is_better=blocks.higher_is_better,
        baseline=finite(blocks.baseline),
        candidate=finite(blocks.candidate),
        aa_first=finite(blocks.aa_first),
        aa_second=finite(blocks.aa_second),
    )


def _without_blocks(runner: _Runner, setup: RunSetup) -> Comparison:
    """Interrupted before one block was whole: no verdict, but what was measured is kept.

    Raises KeyboardInterrupt, or InputError with the reason, if that is nothing.
    """
    if not runner.measured:
        raise InputError(runner.failure) if runner.failure else KeyboardInterrupt
    return Comparison(
        labels=list(runner.measured),
        pairs=[],
        outcomes=[_joined([segments], setup) for segments in runner.measured.values()],
        aa_judgements=[],
        order=[],
        is_interrupted=True,
        failure=runner.failure,
    )


def _withheld(pair: Pair, reason: str) -> Pair:
    """The pair without its verdicts, if there is a reason to refuse them."""
    if reason:
        pair.refused = reason
        pair.judgements = [msgspec.structs.replace(j, verdict="not comparable", reason=reason) for j in pair.judgements]
    return pair


def _refusal(gate: list[GateCheck], aa_judgements: list[Judgement]) -> str:
    failed = [f"{check.name}: {check.detail}" for check in gate if not check.passed]
    if failed:
        return "unequal work: " + "; ".join(failed)
    moved = [j.metric for j in aa_judgements if j.verdict in ("faster", "slower")]
    return f"A differs from itself in {', '.join(moved)}: the machine is not steady" if moved else ""


def _joined(blocks: list[list[Outcome]], setup: RunSetup) -> Outcome:
    """All segments of one endpoint as one run, laid end to end; no time between them counts."""
    segments = [outcome for block in blocks for outcome in block]
    records: list[Record] = []
    health: list[ClientHealth] = []
    offset = 0.0
    for number, segment in enumerate(segments):
        health += segment.health
        records += [_shifted(record, offset, number) for record in segment.records]
        offset += max(record.ended for record in segment.records)
    outcome = conclude(RunResult(records=records, health=_typical(health)), setup)
    joules = [segment.joules for segment in segments if segment.joules is not None]
    outcome.joules = sum(joules) if len(joules) == len(segments) else None
    outcome.energy_note = segments[0].energy_note
    return outcome


def _typical(health: list[ClientHealth]) -> list[ClientHealth]:
    """The segment at the 90th percentile of CPU use: a single busy start of a short segment is no bottleneck."""
    ordered = sorted(health, key=lambda h: h.cpu_share)
    return ordered[int(0.9 * (len(ordered) - 1)) :][:1]


def _shifted(record: Record, offset: float, segment: int) -> Record:
    chunks = [msgspec.structs.replace(chunk, at=chunk.at + offset) for chunk in record.chunks]
    return msgspec.structs.replace(
        record,
        session=record.session + 1_000_000 * segment,
        intended=record.intended + offset,
        sent=record.sent + offset,
        ended=record.ended + offset,
        chunks=chunks,
    )
