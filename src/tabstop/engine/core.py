"""The engine core: requests in, deltas out, one step at a time. Knows no socket, clock or text; time is an argument.

`InprocClient` and the engine process drive the same object; both call `step` with what the previous call returned:

    pending = None
    while core.has_work() or pending:
        pending, deltas = core.step(pending, now)
"""

from __future__ import annotations

import heapq
import logging
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from typing import Protocol

import numpy as np
from msgspec import structs

from tabstop.engine.bounds import check_sampling
from tabstop.engine.masks import MaskFillers
from tabstop.engine.plan import LateInputs, StepPlan, StepResult
from tabstop.engine.request import PromptProgress, Request
from tabstop.engine.scheduler import Scheduler, failure_of
from tabstop.errors import ContextLengthError, InputError, InternalError, OverloadedError, TabstopError
from tabstop.grammar import Constraint, Vocabulary, compile_constraints
from tabstop.grammar.bits import num_words
from tabstop.grammar.tokens import tokens_constraint
from tabstop.types import (
    Abort,
    Delta,
    EngineFailure,
    EngineInfo,
    FinishReason,
    RequestId,
    Stage,
    Stats,
    Submit,
    unpack_ids,
)

log = logging.getLogger(__name__)

MIN_DEADLINES = 64
"""Deadlines of ended requests are forgotten once there are more than that, and more than open requests."""


class Launched(Protocol):
    """A step on its way through the workers."""

    def sample(self, late: LateInputs) -> None:
        """Gives the masks of constrained rows; called once, after launch."""
        ...

    def wait(self) -> tuple[StepPlan, StepResult]: ...


class WorkerGroup(Protocol):
    """All ranks of one model. They do what plans say and decide nothing (worker/group.py)."""

    def launch(self, plan: StepPlan) -> Launched:
        """Starts the forward and returns at once."""
        ...

    def close(self) -> None: ...


class EngineCore:
    """Accepts requests, steps the scheduler and the workers. Single-threaded but for constraint compilation."""

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        workers: WorkerGroup,
        compiler: Executor,
        *,
        stop_sets: Mapping[str, frozenset[int]],
        max_num_waiting: int = 1024,
        overlap: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`vocabulary`: what constraints see; None: of no token the bytes."""
        self.info = structs.replace(info, max_num_waiting=max_num_waiting)
        self.vocabulary = vocabulary or Vocabulary(info.vocab_size)
        self.scheduler = scheduler
        self.workers = workers
        self.compiler = compiler
        self.stop_sets = stop_sets
        self.max_num_waiting = max_num_waiting
        self.overlap = overlap
        self.wake: Callable[[], None] = lambda: None  # called from a helper thread when a compilation ends
        self.note: Callable[[list[RequestId]], None] = lambda requests: None  # these are in hand now
        self._fillers = MaskFillers(self.vocabulary.limits.mask_seconds)
        self._requests: dict[RequestId, list[Request]] = {}
        self._compiling: dict[RequestId, Future[list[Constraint]]] = {}
        self._deadlines: list[tuple[float, int, RequestId, FinishReason]] = []
        self._refusals: list[Delta] = []
        self._arrivals = 0

    # ---- the sentence of the product

    def step(self, pending: Launched | None, now: float) -> tuple[Launched | None, list[Delta]]:
        """Plans and launches the next step; returns it with the deltas known by now.

        With overlap the plan is made while `pending` still runs; without, its tokens come first.
        """
        self._expire(now)
        self._admit_compiled()
        if pending and not self.overlap:
            self.scheduler.update(*pending.wait())
        plan = self.scheduler.schedule()
        if plan.admissions:
            self._note()
        launched = self.workers.launch(plan) if plan else None
        if pending and self.overlap:
            self.scheduler.update(*pending.wait())
        if launched:
            launched.sample(self._late_inputs(plan))
        return launched, self._take_deltas()

    def has_work(self) -> bool:
        """Whether a step would do something (compilations in progress do not count; they call `wake`)."""
        is_compiled = any(future.done() for future in self._compiling.values())
        return bool(self._refusals) or is_compiled or self.scheduler.has_work()

    # ---- requests

    def add(self, submit: Submit, now: float) -> None:
        """Accepts a request. What is wrong with it comes back as terminal deltas, never as an exception."""
        try:
            requests = self._make_requests(submit, now)
        except TabstopError as error:
            self._refuse(submit, error)
            return
        first = requests[0]
        self._requests[submit.request_id] = requests
        if first.deadline is not None:
            self._remember_deadline(first.deadline, first, FinishReason.DEADLINE)
        if submit.limits.queue_ms is not None:
            self._remember_deadline(now + submit.limits.queue_ms / 1000, first, FinishReason.ERROR)
        if submit.constraints:
            for request in requests:
                request.stage = Stage.COMPILING
            rules = tokens_constraint(submit.sampling)
            specs = (*submit.constraints, rules) if rules else submit.constraints
            self._note(submit.request_id)
            future = self.compiler.submit(compile_constraints, specs, self.vocabulary)
            self._compiling[submit.request_id] = future
            future.add_done_callback(lambda _: self.wake())
        else:
            self.scheduler.add(first)

    def _note(self, *more: RequestId) -> None:
        """Says what is in hand, before it is touched. Some of it may have ended when the next request comes."""
        running = (request.request_id for request in self.scheduler.running)
        self.note(list(dict.fromkeys((*running, *self._compiling, *more))))

    def _make_requests(self, submit: Submit, now: float) -> list[Request]:
        tokens = array("I", unpack_ids(submit.prompt_ids))
        self._validate(submit, tokens)
        self._arrivals += 1
        limits = submit.limits
        named = frozenset(limits.stop_token_ids).union(*(self._stop_set(name) for name in limits.stop_sets))
        stop_ids = frozenset(token_id for token_id in named if 0 <= token_id < self.info.vocab_size)
        wants_prompt = submit.sampling.num_prompt_logprobs is not None  # and so its computation
        make = partial(
            Request,
            request_id=submit.request_id,
            num_prompt_tokens=len(tokens),
            sampling=submit.sampling,
            limits=limits,
            stop_ids=stop_ids,
            cache=structs.replace(submit.cache, read=False) if wants_prompt else submit.cache,
            progress=PromptProgress(),
            priority=submit.priority,
            arrival=self._arrivals,
            deadline=None if limits.deadline_ms is None else now + limits.deadline_ms / 1000,
            tenant=submit.tenant,
            session=submit.session,
            adapter=submit.adapter,
        )
        first = make(sample=0, tokens=tokens)
        first.children = [make(sample=n, tokens=tokens[:], parent=first) for n in range(1, submit.num_samples)]
        return [first, *first.children]

    def _validate(self, submit: Submit, tokens: array[int]) -> None:
        info, limits = self.info, submit.limits
        if submit.request_id in self._requests:
            raise InternalError(f"request id {submit.request_id} is in use")
        if len(self.scheduler.waiting) + len(self._compiling) >= self.max_num_waiting:
            raise OverloadedError(f"{self.max_num_waiting} requests are waiting already; retry later", retry_after=1)
        if not tokens or submit.num_samples < 1 or limits.max_tokens < 0:
            raise InputError("a request needs at least one prompt token, one sample and max_tokens of at least 0")
        if max(tokens) >= info.vocab_size:
            raise InputError(f"prompt token {max(tokens)} is outside the vocabulary of {info.vocab_size}")
        check_sampling(submit.sampling, info.vocab_size)
        num_tokens = len(tokens) + limits.max_tokens
        if num_tokens > info.max_model_len or num_tokens > info.num_blocks * info.block_size:
            allowed = min(info.max_model_len, info.num_blocks * info.block_size)
            raise ContextLengthError(
                f"{len(tokens)} prompt tokens and max_tokens of {limits.max_tokens} are more than "
                f"the {allowed} that fit; shorten the prompt or lower max_tokens"
            )
        if submit.adapter:
            raise InputError(f"adapter {submit.adapter!r} is not loaded; this engine has none")

    def _stop_set(self, name: str) -> frozenset[int]:
        if name not in self.stop_sets:
            raise InputError(f"unknown stop set {name!r}; known: {', '.join(self.stop_sets)}")
        return self.stop_sets[name]

    def _refuse(self, submit: Submit, error: TabstopError) -> None:
        failure = EngineFailure(error.code, error.message)
        for sample in range(max(1, submit.num_samples)):
            self._refusals.append(Delta(submit.request_id, sample, [], FinishReason.ERROR, failure=failure))

    def abort(self, abort: Abort) -> None:
        for request in self._requests.get(abort.request_id, ()):
            if not request.is_finished and (abort.samples is None or request.sample in abort.samples):
                self._finish(request, abort.reason)

    def abort_front_end(self, front_end: int) -> None:
        """Ends everything that a dead front end asked for."""
        for request_id in [key for key in self._requests if key[0] == front_end]:
            self.abort(Abort(request_id))

    def abort_all(self, reason: FinishReason = FinishReason.ABORT) -> None:
        for request_id in list(self._requests):
            self.abort(Abort(request_id, reason=reason))

    def _finish(self, request: Request, reason: FinishReason, failure: EngineFailure | None = None) -> None:
        self.scheduler.finish(request, reason, failure)
        if all(r.is_finished for r in self._requests[request.request_id]):
            future = self._compiling.pop(request.request_id, None)
            if future is not None:
                future.cancel()

    def _remember_deadline(self, deadline: float, request: Request, reason: FinishReason) -> None:
        heapq.heappush(self._deadlines, (deadline, request.arrival, request.request_id, reason))
        if len(self._deadlines) > 4 * len(self._requests) + MIN_DEADLINES:  # mostly of requests that ended in time
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._requests]
            heapq.heapify(self._deadlines)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request_id, reason = heapq.heappop(self._deadlines)
            if reason is FinishReason.DEADLINE:
                self.abort(Abort(request_id, reason=reason))
            else:
                self._leave_queue(request_id)

    def _leave_queue(self, request_id: RequestId) -> None:
        """Refuses a request that has waited too long. One that was preempted has begun, and stays."""
        requests = self._requests.get(request_id, ())
        if not any(request.was_admitted for request in requests):
            message = "the request waited too long in the queue; retry later, or raise --max-queue-age"
            for request in requests:
                if not request.is_finished:
                    self._finish(request, FinishReason.ERROR, EngineFailure(OverloadedError.code, message))

    # ---- constraints

    def _admit_compiled(self) -> None:
        for request_id in [key for key, future in self._compiling.items() if future.done()]:
            requests = [request for request in self._requests[request_id] if not request.is_finished]
            future = self._compiling.pop(request_id)
            error = future.exception()
            if error is not None:
                known = (
                    error if isinstance(error, TabstopError) else InternalError("a constraint could not be compiled")
                )
                for request in requests:
                    self._finish(request, FinishReason.ERROR, EngineFailure(known.code, known.message))
                continue
            for request in requests:
                request.constraints = [constraint.fork() for constraint in future.result()]
                request.stage = Stage.WAITING
                if request.parent is None or request.parent.is_finished:
                    self.scheduler.add(request)

    def _late_inputs(self, plan: StepPlan) -> LateInputs:
        """Masks for the constrained rows of a launched plan, after the tokens before it are known.

        A row whose constraints raise, take too long or allow no token gets none: its request ends with an error.
        """
        requests = self.scheduler.flying(plan.step)
        rows = [
            (index, request)
            for index, (row, request) in enumerate(zip(plan.rows, requests, strict=True))
            if row.constrained and not request.is_finished
        ]
        if not rows:
            return LateInputs()
        masks = np.full((len(rows), num_words(self.info.vocab_size)), -1, np.int32)
        jobs = [partial(_fill, request, mask) for (_, request), mask in zip(rows, masks, strict=True)]
        errors = self._fillers.run(jobs)
        late = LateInputs()
        for (index, request), mask, error in zip(rows, masks, errors, strict=True):
            if error is None:
                late.masks[index] = mask
            else:
                self._finish(request, FinishReason.ERROR, failure_of(error))
        return late

    # ---- reports

    def _take_deltas(self) -> list[Delta]:
        deltas = self._refusals + self.scheduler.take_deltas()
        self._refusals = []
        for delta in deltas:
            requests = self._requests.get(delta.request_id, ())
            if delta.finish and requests and all(request.is_finished for request in requests):
                del self._requests[delta.request_id]
        return deltas

    @property
    def num_requests(self) -> int:
        """Requests that are not finished, at any stage."""
        return len(self._requests)

    def stats(self) -> Stats:
        scheduler, counters = self.scheduler, self.scheduler.counters
        return Stats(
            num_steps=scheduler.step,
            num_waiting=len(scheduler.waiting) + len(self._compiling),
            num_running=len(scheduler.running),
            num_requests=self.num_requests,
            num_requests_running=len({request.request_id for request in scheduler.running}),
            ledger=scheduler.ledger(),
            num_prompt_tokens=counters.num_prompt_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_generation_tokens=counters.num_generation_tokens,
            num_preemptions=counters.num_preemptions,
            num_overrun_tokens=counters.num_overrun_tokens,
            aborts=dict(counters.aborts),
            finished=dict(counters.finished),
        )

    def check(self) -> None:
        """Asserts every invariant; slow. When nothing runs, nothing may be owned."""
        self.scheduler.check()
        if not self._requests:
            ledger = self.scheduler.ledger()
            assert not self.scheduler.running and not self.scheduler.waiting and not self._compiling
            assert ledger.used == ledger.waste == 0, ledger

    def close(self) -> None:
        self.workers.close()
        self._fillers.close()
        self.compiler.shutdown(wait=False, cancel_futures=True)


def _fill(request: Request, mask: np.ndarray) -> None:
    """The tokens that all constraints of a request allow. Raises InputError when there are none."""
    ends = request.ends
    for constraint in request.constraints:
        constraint.fill(mask, ends)
    if not mask.any():
        raise InputError("the grammar and the other parameters of this request allow no further token")
