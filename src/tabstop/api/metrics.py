"""/metrics: what this front end measured, and what the engines report of themselves.

Front ends are several processes behind one port. With PROMETHEUS_MULTIPROC_DIR set before this process started,
prometheus_client keeps every process's numbers in files there, and a scrape of any front end sums them; without it a
scrape shows this process. Engine numbers come from EngineClient.stats, which is the whole engine's in every front end.
Labels are few and bounded: model, path, status, outcome; never a user, a session or a prompt.
"""

from __future__ import annotations

import logging
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import Scope

from tabstop.api.engine_metrics import EngineCollector
from tabstop.call import Summary
from tabstop.engine.recorder import name_of
from tabstop.service import Service

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

MILLISECONDS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 500, 750)
SECONDS = (1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600)
BUCKETS = (*(ms / 1000 for ms in MILLISECONDS), *SECONDS)
TOKEN_BUCKETS = (0.0005, 0.001, 0.0015, *(ms / 1000 for ms in MILLISECONDS[1:]), 1, 2, 5, 10)


CLIENTS = (
    *("continue", "llama.vscode", "llm-ls", "tabby", "twinny", "zed", "minuet", "cody", "jetbrains", "neovim", "vim"),
    *("vscode", "openai", "python", "curl", "node", "axios"),
)
"""What user agents are looked for, in this order."""


class Metrics:
    """An Observer (answer.py) that fills Prometheus metrics and writes one log line for each request."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._engines = EngineCollector(service.models)
        shared: dict[str, Any] = {"registry": self._registry, "namespace": "tabstop"}
        times = (
            ("time_to_first_token_seconds", "Request to first token", BUCKETS),
            ("inter_token_latency_seconds", "Between two tokens of a sample", TOKEN_BUCKETS),
            ("e2e_request_latency_seconds", "Request to the end of the answer", BUCKETS),
        )
        self._first, self._next, self._whole = (
            Histogram(name, text, ["model"], buckets=buckets, **shared) for name, text, buckets in times
        )
        self._requests = Counter("requests", "Answers that ended, by outcome", ["model", "outcome"], **shared)
        self._finishes = Counter("samples_finished", "Samples that ended, by reason", ["model", "reason"], **shared)
        tokens = (
            ("answer_prompt_tokens", "Prompt tokens of ended answers"),
            ("answer_cached_tokens", "Prompt tokens of ended answers found in the prefix cache"),
            ("answer_completion_tokens", "Tokens kept in ended answers"),
        )
        self._tokens = [Counter(name, text, ["model"], **shared) for name, text in tokens]
        fills = (
            ("fill_requests", "Holes filled", ["model", "family", "client"]),
            ("fill_transcoded", "Raw prompts in another family's markers", ["model", "family"]),
            ("fill_recomputed_tokens", "Prompt tokens of holes not found in the prefix cache", ["model"]),
            ("fill_overlaps", "Samples cut where they repeated the suffix", ["model"]),
            ("healed_tokens", "Tokens taken back from the ends of prompts", ["model"]),
        )
        self._fills, self._transcoded, self._recomputed, self._overlaps, self._healed = (
            Counter(name, text, labels, **shared) for name, text, labels in fills
        )
        self._http = Counter("http_responses", "Responses, by route and status", ["route", "status"], **shared)
        self._states = Gauge(
            "text_states", "Samples whose text is being assembled", multiprocess_mode="livesum", **shared
        )

    # ---- Observer

    def on_text_states(self, change: int) -> None:
        self._states.inc(change)

    def on_first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def on_next_tokens(self, model: str, seconds: float, num_tokens: int) -> None:
        self._next.labels(model).observe(seconds / num_tokens)

    def on_end(self, summary: Summary) -> None:
        model, usage = summary.model, summary.usage
        self._requests.labels(model, summary.outcome).inc()
        for reason in summary.finishes:
            self._finishes.labels(model, reason.value).inc()
        counts = (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_completion_tokens)
        for counter, count in zip(self._tokens, counts, strict=True):
            counter.labels(model).inc(count)
        self._count_fills(summary)
        if summary.outcome == "ok":
            self._whole.labels(model).observe(summary.seconds)
        _log_line(summary)

    def _count_fills(self, summary: Summary) -> None:
        model, usage = summary.model, summary.usage
        for fill in summary.fills:
            self._fills.labels(model, fill.family or "none", client_of(summary.client)).inc()
            if fill.transcoded:
                self._transcoded.labels(model, fill.transcoded).inc()
        if summary.fills:
            self._recomputed.labels(model).inc(usage.num_prompt_tokens - usage.num_cached_tokens)
            self._overlaps.labels(model).inc(summary.num_overlaps)
        self._healed.labels(model).inc(summary.num_healed_tokens)

    # ---- HTTP

    def on_response(self, scope: Scope, status: int) -> None:
        """Counts by the route's pattern, so that no client can invent labels."""
        self._http.labels(getattr(scope.get("route"), "path", "none"), str(status)).inc()

    def page(self) -> bytes:
        """The text of /metrics. Reads files when front ends are several: call it in a thread."""
        try:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        except ValueError:  # one process: no folder was set
            registry = self._registry
        engines = CollectorRegistry()
        engines.register(self._engines)
        return bytes(generate_latest(registry) + generate_latest(engines))


def client_of(user_agent: str) -> str:
    """A known client's name, or "other": no client can invent labels."""
    lower = user_agent.lower()
    return next((name for name in CLIENTS if name in lower), "other")


def _log_line(summary: Summary) -> None:
    usage = summary.usage
    first = summary.first_token_seconds
    fields = {
        "request_id": summary.request_id,
        "model": summary.model,
        "outcome": summary.outcome,
        "engine_ids": None if summary.outcome == "ok" else ",".join(map(name_of, summary.engine_ids)),
        "finish": ",".join(sorted({reason.value for reason in summary.finishes})),
        "prompt_tokens": usage.num_prompt_tokens,
        "cached_tokens": usage.num_cached_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "first_token_ms": None if first is None else round(first * 1000, 1),
        "total_ms": round(summary.seconds * 1000, 1),
    }
    line = " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, ""))
    log.info("answered %s", line, extra={"fields": fields})
