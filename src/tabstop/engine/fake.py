"""An engine without a model: the EngineClient protocol with scripted or hashed tokens, for tests and demonstrations.

Knows stop sets, limits, aborts and deadlines as the real engine does; knows no blocks, so its ledger is empty. Tokens
depend on the prompt, the seed and the sample alone, never on what else runs.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabstop.engine.delivery import DeltaStream
from tabstop.errors import EngineDeadError, InputError
from tabstop.types import (
    Delta,
    EngineFailure,
    EngineInfo,
    FinishReason,
    RequestId,
    Stage,
    Stats,
    Submit,
    TokenLogprobs,
    unpack_ids,
)

Script = Callable[[Submit, int], Iterator[int]]
"""(request, sample) → its tokens. When they run out the sample ends as if an end token had come."""

INFO = EngineInfo(
    "fake", "FakeForCausalLM", max_model_len=4096, vocab_size=1 << 18, block_size=16, num_blocks=256, max_num_seqs=64
)


def hashed(submit: Submit, sample: int) -> Iterator[int]:
    """Endless tokens below 256 that depend on the prompt, the seed and the sample."""
    state = zlib.crc32(f"{submit.sampling.seed}/{sample}".encode(), zlib.crc32(submit.prompt_ids))
    for position in itertools.count():
        state = zlib.crc32(position.to_bytes(4, "little"), state)
        yield state % 256


def scripted(*continuations: Sequence[int]) -> Script:
    """Sample i says continuations[i % len]; then it ends."""
    return lambda submit, sample: iter(continuations[sample % len(continuations)])


@dataclass(slots=True)
class _Sample:
    tokens: Iterator[int]
    num_tokens: int = 0


@dataclass(slots=True)
class _Request:
    submit: Submit
    stream: DeltaStream
    samples: dict[int, _Sample]  # those not yet ended
    num_cached_tokens: int
    deadline: float | None  # on the loop's clock
    stop_ids: frozenset[int]
    is_prompt_said: bool = False


def _likelihood(token_id: int, num_top: int) -> TokenLogprobs:
    """The same number for the same token, in eighths, so that sums are exact."""
    logprob = -(token_id % 7) / 8
    return TokenLogprobs(logprob, 1, [token_id][:num_top], [logprob][:num_top])


@dataclass
class FakeEngine:
    """Implements EngineClient. Each request runs in a task of the event loop that called `submit`."""

    script: Script = hashed
    stop_sets: Mapping[str, frozenset[int]] = field(default_factory=dict)
    engine_info: EngineInfo = INFO
    delay: float = 0.0  # seconds before each token
    front_end: int = 0
    max_num_requests: int = 1024  # live ones; more are refused as the real queue refuses them
    num_waiting: int = 0  # what stats say; nothing waits here
    num_unreported: int = 0
    num_submitted: int = 0
    num_generated: int = 0
    num_finished: Counter[str] = field(default_factory=Counter)  # samples by FinishReason
    num_aborted: Counter[str] = field(default_factory=Counter)  # requests by Stage
    submitted: list[Submit] = field(default_factory=list)  # the last 16, for tests

    def __post_init__(self) -> None:
        self._counter = itertools.count()
        self._requests: dict[RequestId, _Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._prompts: dict[str, list[int]] = {}  # the last prompt of each cache scope
        self._death: str | None = None

    # ---- what tests look at

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def die(self, reason: str = "the fake engine was told to die") -> None:
        """Ends every open sample with an error; every later verb raises EngineDeadError."""
        self._death = reason
        failure = EngineFailure(EngineDeadError.code, reason)
        for request in list(self._requests.values()):
            for sample in list(request.samples):
                self._finish(request, sample, FinishReason.ERROR, failure=failure)

    # ---- EngineClient

    @property
    def info(self) -> EngineInfo:
        self._check_alive()
        return self.engine_info

    @property
    def stats(self) -> Stats:
        self._check_alive()
        return Stats(
            num_running=sum(len(request.samples) for request in self._requests.values()),
            num_requests=len(self._requests),
            num_requests_running=len(self._requests),
            num_waiting=self.num_waiting,
            num_generation_tokens=self.num_generated,
            aborts=dict(self.num_aborted),
            finished=dict(self.num_finished),
        )

    def new_request_id(self) -> RequestId:
        return self.front_end, next(self._counter)

    def submit(self, submit: Submit) -> DeltaStream:
        self._check_alive()
        self.num_submitted += 1
        self.submitted = [*self.submitted[-15:], submit]
        stream = DeltaStream(submit.request_id, submit.num_samples, lambda stream: self.abort(stream.request_id))
        if len(self._requests) >= self.max_num_requests:
            stream.fail(EngineFailure("overloaded", "the queue is full; try again later"))
            return stream
        request = self._requests[submit.request_id] = self._request(submit, stream)
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def abort(
        self, request_id: RequestId, samples: tuple[int, ...] | None = None, reason: FinishReason = FinishReason.ABORT
    ) -> None:
        request = self._requests.get(request_id)
        if request is None:
            return
        if reason is FinishReason.ABORT:
            started = any(sample.num_tokens for sample in request.samples.values())
            self.num_aborted[Stage.DECODING if started else Stage.WAITING] += 1
        for sample in list(request.samples) if samples is None else samples:
            self._finish(request, sample, reason)

    async def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        self._check_alive()
        if name not in ("warm", "drain"):
            raise InputError(f"unknown command {name!r}")
        return None

    # ---- inside

    def _check_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death)

    def _request(self, submit: Submit, stream: DeltaStream) -> _Request:
        limits = submit.limits
        deadline = None if limits.deadline_ms is None else asyncio.get_running_loop().time() + limits.deadline_ms / 1000
        stop_ids = frozenset(limits.stop_token_ids).union(*(self.stop_sets[name] for name in limits.stop_sets))
        samples = {sample: _Sample(self.script(submit, sample)) for sample in range(submit.num_samples)}
        return _Request(submit, stream, samples, self._cached(submit), deadline, stop_ids)

    def _cached(self, submit: Submit) -> int:
        """Whole blocks shared with the scope's last prompt; the last token is always computed."""
        prompt, last = unpack_ids(submit.prompt_ids), self._prompts.get(submit.cache.scope, [])
        if submit.cache.write:
            self._prompts[submit.cache.scope] = prompt
        if not submit.cache.read or submit.sampling.num_prompt_logprobs is not None:
            return 0
        common = next(
            (i for i, (a, b) in enumerate(zip(prompt, last, strict=False)) if a != b), min(len(prompt), len(last))
        )
        size = self.engine_info.block_size
        return min(common, len(prompt) - 1) // size * size

    async def _run(self, request: _Request) -> None:
        """One token of every live sample a turn, as a batch would."""
        while request.samples:
            await asyncio.sleep(self.delay)
            if request.deadline is not None and asyncio.get_running_loop().time() >= request.deadline:
                for sample in list(request.samples):
                    self._finish(request, sample, FinishReason.DEADLINE)
            for sample in list(request.samples):
                self._step(request, sample)

    def _step(self, request: _Request, sample: int) -> None:
        state, limits = request.samples[sample], request.submit.limits
        if limits.max_tokens == 0:
            return self._finish(request, sample, FinishReason.LENGTH)
        token_id = next(state.tokens, None)
        if token_id is None:
            return self._finish(request, sample, FinishReason.STOP)
        state.num_tokens += 1
        self.num_generated += 1
        if token_id in request.stop_ids and state.num_tokens > limits.min_tokens:
            return self._finish(request, sample, FinishReason.STOP, [token_id], stop_token_id=token_id)
        if state.num_tokens == limits.max_tokens:
            return self._finish(request, sample, FinishReason.LENGTH, [token_id])
        request.stream.put(self._delta(request, sample, [token_id]))
        return None

    def _finish(
        self,
        request: _Request,
        sample: int,
        reason: FinishReason,
        token_ids: Sequence[int] = (),
        **delta: Any,
    ) -> None:
        """The sample's one terminal delta; the request is gone with its last sample. Ended samples are ignored."""
        if request.samples.pop(sample, None) is None:
            return
        self.num_finished[reason] += 1
        request.stream.put(self._delta(request, sample, list(token_ids), finish=reason, **delta))
        if not request.samples:
            self._requests.pop(request.submit.request_id, None)

    def _delta(self, request: _Request, sample: int, token_ids: list[int], **delta: Any) -> Delta:
        if (num_top := request.submit.sampling.num_logprobs) is not None:  # a script is certain of its tokens
            delta["logprobs"] = [_likelihood(i, num_top) for i in token_ids]
        if (num_top := request.submit.sampling.num_prompt_logprobs) is not None and not request.is_prompt_said:
            prompt, request.is_prompt_said = unpack_ids(request.submit.prompt_ids), True
            delta["prompt_logprobs"] = [_likelihood(i, num_top) for i in prompt[1:]]
        return Delta(request.submit.request_id, sample, token_ids, num_cached_tokens=request.num_cached_tokens, **delta)
