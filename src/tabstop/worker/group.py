"""The ranks of one model behind one handle. Today one rank, in this process.

On a CPU the worker has a thread of its own: torch releases the interpreter lock, so the engine's loop sends the last
step's tokens meanwhile. On a GPU a launch only queues work, so it needs no thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from tabstop.engine.plan import LateInputs, StepPlan, StepResult
from tabstop.worker.worker import Drawn, Worker


class InlineExecutor(Executor):
    """Runs at once, in the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


class LocalStep:
    """A step of a LocalGroup. Steps run in launch order."""

    def __init__(self, executor: Executor, worker: Worker, plan: StepPlan) -> None:
        self._executor, self._worker, self._plan = executor, worker, plan
        self._is_late = any(row.constrained for row in plan.rows)
        self._drawn: Future[Drawn] | None = None
        run = worker.forward if self._is_late else self._run
        self._launched: Future[Any] = executor.submit(run, plan)

    def _run(self, plan: StepPlan) -> Drawn:
        return self._worker.sample(self._worker.forward(plan), LateInputs())

    def sample(self, late: LateInputs) -> None:
        """Steps without constrained rows have not waited for this."""
        self._drawn = self._executor.submit(self._sample, late) if self._is_late else self._launched

    def _sample(self, late: LateInputs) -> Drawn:
        return self._worker.sample(self._launched.result(), late)

    def wait(self) -> tuple[StepPlan, StepResult]:
        """Blocks until the tokens are there; raises what the device raised."""
        assert self._drawn is not None, "sample comes before wait"
        return self._plan, self._drawn.result().result(self._plan)


class LocalGroup:
    """A group of one rank: no broadcast."""

    def __init__(self, worker: Worker) -> None:
        self.worker: Worker | None = worker
        is_cpu = worker.device.type == "cpu"
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="worker") if is_cpu else InlineExecutor()

    def launch(self, plan: StepPlan) -> LocalStep:
        assert self.worker is not None, "closed"
        return LocalStep(self._executor, self.worker, plan)

    def close(self) -> None:
        """Lets the model and its KV memory go."""
        self._executor.shutdown(wait=True)
        self.worker = None
