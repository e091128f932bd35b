"""The ranks of one model behind one handle. Today one rank, in a thread of this process.

The thread is what lets the engine's loop send the last step's tokens while the device runs: torch releases the
interpreter lock, and the loop never computes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from tabstop.engine.plan import LateInputs, StepPlan, StepResult
from tabstop.worker.worker import Worker


class LocalStep:
    """A step of a LocalGroup. Steps run in launch order, on one thread."""

    def __init__(self, executor: ThreadPoolExecutor, worker: Worker, plan: StepPlan) -> None:
        self._executor, self._worker, self._plan = executor, worker, plan
        self._is_late = any(row.constrained for row in plan.rows)
        self._result: Future[StepResult] = executor.submit(self._run)

    def _run(self) -> StepResult:
        self._forward = self._worker.forward(self._plan)
        return StepResult([]) if self._is_late else self._sample(LateInputs())

    def _sample(self, late: LateInputs) -> StepResult:
        return self._worker.sample(self._plan, *self._forward, late)

    def sample(self, late: LateInputs) -> None:
        """Steps without constrained rows have not waited for this."""
        if self._is_late:
            self._result = self._executor.submit(self._sample_after, self._result, late)

    def _sample_after(self, forwarded: Future[StepResult], late: LateInputs) -> StepResult:
        forwarded.result()
        return self._sample(late)

    def wait(self) -> tuple[StepPlan, StepResult]:
        """Blocks until the tokens are there; raises what the device raised."""
        return self._plan, self._result.result()


class LocalGroup:
    """A group of one rank: no broadcast, one compute thread."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")

    def launch(self, plan: StepPlan) -> LocalStep:
        return LocalStep(self._executor, self.worker, plan)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
