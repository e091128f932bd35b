"""An engine core without a model, for tests of the processes around it. Child processes import it by name.

Each step takes STEP_SECONDS and gives every open sample one token: token i of a request with n prompt tokens is n + i.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tabstop.config import EngineConfig
from tabstop.errors import MemoryShortageError
from tabstop.types import (
    Abort,
    Delta,
    EngineInfo,
    FinishReason,
    Ledger,
    RequestId,
    Stats,
    Submit,
    unpack_ids,
)

NAME = "tests.engine.stub_core:build"
STEP_SECONDS = 0.005
CRASH = 200  # a prompt that starts with this token breaks the core
SLOW = 201  # a prompt that starts with this token makes its step take SLOW_SECONDS
SLOW_SECONDS = 2.5


@dataclass
class Sample:
    submit: Submit
    sample: int
    num_prompt_tokens: int
    num_tokens: int = 0


@dataclass
class StubCore:
    info: EngineInfo
    wake: Callable[[], None] = lambda: None
    note: Callable[[list[RequestId]], None] = lambda requests: None
    samples: dict[tuple[RequestId, int], Sample] = field(default_factory=dict)
    ended: list[Delta] = field(default_factory=list)
    num_steps: int = 0
    aborts: int = 0
    seconds: float = STEP_SECONDS

    def add(self, submit: Submit, now: float) -> None:
        ids = unpack_ids(submit.prompt_ids)
        if ids[0] == SLOW:
            self.seconds = SLOW_SECONDS
        for number in range(submit.num_samples):
            self.samples[submit.request_id, number] = Sample(submit, number, len(ids))
        self.note(list({request_id for request_id, _ in self.samples}))

    def abort(self, abort: Abort) -> None:
        for key, sample in list(self.samples.items()):
            if key[0] == abort.request_id and (abort.samples is None or sample.sample in abort.samples):
                del self.samples[key]
                self.ended.append(Delta(key[0], key[1], [], abort.reason))
                self.aborts += 1

    def abort_front_end(self, front_end: int) -> None:
        for request_id in {key[0] for key in self.samples if key[0][0] == front_end}:
            self.abort(Abort(request_id))

    def step(self, pending: float | None, now: float) -> tuple[float | None, list[Delta]]:
        deltas, self.ended = self.ended, []
        if pending is not None:
            time.sleep(max(0.0, pending - time.monotonic()))
            deltas += self._tokens()
            self.num_steps += 1
        if not self.samples:
            return None, deltas
        if any(unpack_ids(sample.submit.prompt_ids)[0] == CRASH for sample in self.samples.values()):
            raise RuntimeError("planted fault")
        launched, self.seconds = time.monotonic() + self.seconds, STEP_SECONDS
        return launched, deltas

    def _tokens(self) -> list[Delta]:
        deltas = []
        for key, sample in list(self.samples.items()):
            token = sample.num_prompt_tokens + sample.num_tokens
            sample.num_tokens += 1
            is_last = sample.num_tokens >= sample.submit.limits.max_tokens
            deltas.append(Delta(key[0], key[1], [token % 256], FinishReason.LENGTH if is_last else None))
            if is_last:
                del self.samples[key]
        return deltas

    def has_work(self) -> bool:
        return bool(self.samples or self.ended)

    def stats(self) -> Stats:
        used = len(self.samples)
        return Stats(
            num_steps=self.num_steps,
            num_running=used,
            num_requests=used,
            num_requests_running=used,
            ledger=Ledger(total=1000, used=used, free=1000 - used),
            aborts={"decoding": self.aborts},
        )


def build(config: EngineConfig, progress: Callable[[str, int, int], None]) -> StubCore:
    """`config.attention` names the fault to plant; `config.max_model_len` is the context."""
    progress("weights", 0, 100)
    if config.attention == "startup-error":
        raise MemoryShortageError("the stub does not fit; choose a smaller stub")
    if config.attention == "broken-load":
        raise RuntimeError("planted fault while loading")
    if config.attention == "slow-load":
        time.sleep(1.5)
    progress("weights", 100, 100)
    return StubCore(
        EngineInfo(
            model="stub",
            architecture="Stub",
            max_model_len=config.max_model_len or 2048,
            vocab_size=512,
            block_size=16,
            num_blocks=64,
            max_num_seqs=config.max_num_seqs or 64,
            kernels={"attention": "none"},
        )
    )
