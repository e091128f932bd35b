"""Workloads: what is asked. A workload is a function (WorkloadSpec, PromptMaker) → sessions; one registry line each.

Two random streams: lengths and rhythm depend on (seed, block) alone, so that every endpoint gets the same work; the
contents depend on (seed, block, salt), so that one server asked twice (A against itself) never sees a prompt again.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np

from tabstop.bench.records import Session, Turn
from tabstop.bench.workloads.prompts import PromptMaker
from tabstop.errors import ConfigError


class WorkloadSpec(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Which requests, how many, and from which seeds. Lengths are in tokens."""

    name: str = "random"
    num_requests: int = 100  # sessions, for workloads of several turns
    input_tokens: str = "128"  # see lengths.py: "128", "100:500", "lognormal:1469:1.1"
    output_tokens: str = "64"
    ignore_end: bool = True  # generate to max_tokens, where the dialect can say so
    folder: Path | None = None  # fim, typing: source files
    fim_template: str = ""  # "" sends suffix as a field; else text with {prefix} and {suffix}
    trace: str = "azure-code"  # built-in name or CSV path
    trace_speed: float = 1.0  # 2 replays twice as fast
    trace_skip: int = 0  # rows
    max_input_tokens: int | None = None  # cut longer prompts of a trace
    num_turns: int = 4  # chat, agent
    think_time: float = 1.0  # mean. unit: seconds
    live_answers: bool = False  # chat: carry the server's own answers instead of scripted ones
    num_prefixes: int = 4  # shared-prefix, agent
    prefix_tokens: int = 1024  # shared-prefix, agent, chat (system prompt)
    cancel_rate: float = 0.0  # share of requests that the client gives up
    cancel_after: float = 0.2  # mean time to giving up. unit: seconds
    verbatim: bool = False  # humaneval, fim: no line that makes a repeated prompt unique
    seed: int = 0
    block: int = 0  # of a comparison or sweep
    salt: int = 0  # another content of the same shape

    def shape_rng(self) -> np.random.Generator:
        """For lengths, choices and rhythm: equal for all endpoints."""
        return np.random.default_rng([self.seed, self.block, 0, _stable(self.name)])

    def content_rng(self) -> np.random.Generator:
        """For the words or ids themselves."""
        return np.random.default_rng([self.seed, self.block, 1 + self.salt, _stable(self.name)])


Workload = Callable[[WorkloadSpec, PromptMaker], list[Session]]

_REGISTRY = {
    "random": ("synthetic", "random_lengths"),
    "article": ("synthetic", "article"),
    "shared-prefix": ("synthetic", "shared_prefix"),
    "trace": ("trace", "replay"),
    "humaneval": ("code", "humaneval"),
    "fim": ("code", "fill_in_the_middle"),
    "typing": ("code", "typing_session"),
    "chat": ("conversation", "chat"),
    "agent": ("conversation", "agent"),
}
NAMES = tuple(_REGISTRY)


def make_sessions(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """The spec's requests, with the cancellations that it asks for.

    Raises ConfigError for an unknown name and for prompts that repeat by accident.
    """
    if spec.name not in _REGISTRY:
        raise ConfigError(f"unknown workload {spec.name!r}; choose one of {', '.join(NAMES)}")
    module, function = _REGISTRY[spec.name]
    workload: Workload = getattr(importlib.import_module(f"tabstop.bench.workloads.{module}"), function)
    sessions = with_cancellations(workload(spec, maker), spec)
    if not spec.verbatim:
        repeated = num_repeated(turn for session in sessions for turn in session.turns)
        if repeated:
            raise ConfigError(f"{repeated} prompts of workload {spec.name} repeat: they are too short to differ")
    return sessions


def num_repeated(turns: Iterable[Turn]) -> int:
    """Prompts that were asked before in the same run."""
    keys = [hashlib.sha256(repr((t.ids, t.text, t.suffix, t.messages)).encode()).digest() for t in turns]
    return len(keys) - len(set(keys))


def with_cancellations(sessions: list[Session], spec: WorkloadSpec) -> list[Session]:
    """A share of all turns gets a time after which the client hangs up (exponential around the mean)."""
    if not 0 <= spec.cancel_rate <= 1:
        raise ConfigError(f"--cancel-rate is {spec.cancel_rate:g}; it must be 0 to 1")
    if spec.cancel_rate == 0:
        return sessions
    rng = np.random.default_rng([spec.seed, spec.block, 2])

    def one(turn: Turn) -> Turn:
        patience = float(rng.exponential(spec.cancel_after))
        is_given_up = rng.random() < spec.cancel_rate
        return msgspec.structs.replace(turn, cancel_after=max(0.001, patience)) if is_given_up else turn

    return [msgspec.structs.replace(session, turns=[one(turn) for turn in session.turns]) for session in sessions]


def _stable(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
