"""HumanEval-Infilling against an endpoint: asks for every hole, runs every filled program, counts what passes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

from tabstop.evaluation import REQUEST_FAILED, Filling, Result, Task
from tabstop.evaluation.ask import Question, ask, open_session
from tabstop.evaluation.programs import run_program

Progress = Callable[[Result], None]


def program(task: Task, completion: str) -> str:
    """The filled file with its test."""
    return f"{task.prompt}{completion}{task.suffix}\n{task.test}\ncheck({task.entry_point})\n"


def completion_of(filling: Filling, *, is_line: bool) -> str:
    """A line without its end, which was the stop, gets it back."""
    return filling.text + "\n" if is_line and not filling.text.endswith("\n") else filling.text


async def judge(task: Task, filling: Filling, completion: str) -> Result:
    """Runs the filled program, if there is a filling."""
    error = REQUEST_FAILED if filling.problem else await run_program(program(task, completion))
    return Result(
        task_id=task.task_id,
        passed=not error,
        error=error,
        completion=completion,
        finish_reason=filling.finish_reason,
        num_tokens=filling.num_tokens,
        num_healed_tokens=filling.num_healed_tokens,
        seconds=round(filling.seconds, 4),
        problem=filling.problem,
    )


async def evaluate(question: Question, tasks: Sequence[Task], concurrency: int, on_result: Progress) -> None:
    """All tasks, `concurrency` of them at a time; each goes to `on_result` as soon as it is decided."""
    asking, running = asyncio.Semaphore(concurrency), asyncio.Semaphore(os.cpu_count() or 1)

    async with open_session(question) as session:

        async def one(task: Task) -> None:
            async with asking:
                filling = await ask(session, question, task)
            async with running:
                completion = "" if filling.problem else completion_of(filling, is_line=question.is_line)
                on_result(await judge(task, filling, completion))

        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(one(task))
