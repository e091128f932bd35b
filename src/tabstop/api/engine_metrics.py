"""Engine statistics (types.Stats, types.EngineInfo) → Prometheus metrics, read at each scrape.

Counters are totals since the engine started. The parts of the KV pool (tabstop_kv_cache_slots) add up to its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tabstop.errors import TabstopError
from tabstop.service import ServedModel
from tabstop.types import EngineInfo, Ledger, Stats


@dataclass(frozen=True, slots=True)
class _Figure:
    """One metric: a number, or numbers by the values of one more label."""

    name: str
    help: str
    read: Callable[[EngineInfo, Stats], float | Mapping[str, float]]
    label: str | None = None
    is_counter: bool = False

    def family(self) -> CounterMetricFamily | GaugeMetricFamily:
        labels = ["model", "engine", *([self.label] if self.label else [])]
        kind = CounterMetricFamily if self.is_counter else GaugeMetricFamily
        return kind(f"tabstop_{self.name}", self.help, labels=labels)


def _slots(ledger: Ledger) -> dict[str, float]:
    parts: dict[str, float] = msgspec.structs.asdict(ledger)
    del parts["total"]
    return parts


def _usage(ledger: Ledger) -> float:
    return (ledger.used + ledger.waste + ledger.reserved) / ledger.total if ledger.total else 0.0


def _num_requests_waiting(stats: Stats) -> int:
    """A preempted one, too; one with n samples waits until the first of them runs."""
    return stats.num_requests - stats.num_requests_running


FIGURES = (
    _Figure("num_requests_running", "Requests being computed", lambda info, stats: stats.num_requests_running),
    _Figure("num_requests_waiting", "Requests in the queue", lambda info, stats: _num_requests_waiting(stats)),
    _Figure("num_samples_running", "Samples being computed, each in a slot", lambda info, stats: stats.num_running),
    _Figure("max_num_seqs", "Slots", lambda info, stats: info.max_num_seqs),
    _Figure("kv_cache_usage_ratio", "Part of the KV pool that requests hold", lambda info, stats: _usage(stats.ledger)),
    _Figure("kv_cache_slots", "Token slots of the KV pool", lambda info, stats: _slots(stats.ledger), "state"),
    _Figure("kv_cache_blocks", "Blocks of the KV pool", lambda info, stats: info.num_blocks),
    _Figure("kv_cache_block_size", "Token slots of a block", lambda info, stats: info.block_size),
    _Figure("device_memory_bytes", "Memory of a GPU, by part", lambda info, stats: info.memory, "part"),
    _Figure("max_model_len", "Longest prompt and completion", lambda info, stats: info.max_model_len),
    _Figure("engine_steps", "Steps", lambda info, stats: stats.num_steps, is_counter=True),
    _Figure("prompt_tokens", "Prompt tokens", lambda info, stats: stats.num_prompt_tokens, is_counter=True),
    _Figure(
        "prefix_cache_hit_tokens",
        "Prompt tokens found in the prefix cache",
        lambda info, stats: stats.num_cached_tokens,
        is_counter=True,
    ),
    _Figure("generation_tokens", "Tokens generated", lambda info, stats: stats.num_generation_tokens, is_counter=True),
    _Figure(
        "preemptions", "Requests sent back to the queue", lambda info, stats: stats.num_preemptions, is_counter=True
    ),
    _Figure(
        "overrun_tokens",
        "Tokens sampled for samples that had ended",
        lambda info, stats: stats.num_overrun_tokens,
        is_counter=True,
    ),
    _Figure("aborts", "Aborted requests, by stage", lambda info, stats: stats.aborts, "stage", is_counter=True),
    _Figure("finished", "Samples that ended, by reason", lambda info, stats: stats.finished, "reason", is_counter=True),
)


class EngineCollector(Collector):
    """An engine that is gone or still loading shows as tabstop_engine_up 0 and nothing else."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._engines = [
            ([model.name, str(number)], engine) for model in models for number, engine in enumerate(model.engines)
        ]

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("tabstop_engine_up", "1 when the engine answers", labels=["model", "engine"])
        families = [(figure, figure.family()) for figure in FIGURES]
        for labels, engine in self._engines:
            try:
                info, stats = engine.info, engine.stats
            except TabstopError:
                up.add_metric(labels, 0)
                continue
            up.add_metric(labels, 1)
            for figure, family in families:
                value = figure.read(info, stats)
                if isinstance(value, Mapping):
                    for part, number in value.items():
                        family.add_metric([*labels, part], number)
                else:
                    family.add_metric(labels, value)
        yield up
        yield from (family for _, family in families)
