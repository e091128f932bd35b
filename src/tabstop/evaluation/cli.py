"""`tabstop eval …`: options in, a table and a JSON file out. Exit codes as those of `tabstop bench`.

0: done, whatever passed. 2: bad input, one line on stderr. 130: Ctrl-C; what was decided until then is kept.
"""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import tabstop
from tabstop.errors import ConfigError, InputError
from tabstop.evaluation import NOT_JSON, Report, Result, Task, printable
from tabstop.evaluation.ask import HEALING, Question, check_question, first_model, open_session
from tabstop.evaluation.compare import Comparison, Difference, compare
from tabstop.evaluation.infilling import evaluate
from tabstop.evaluation.progress import LiveCount
from tabstop.evaluation.tasks import DATA, SETS, find_set, load_tasks
from tabstop.exits import EXIT_INTERRUPTED, fails_in_one_line

eval_app = typer.Typer(no_args_is_help=True, help="Measure what a served model gets right, and compare two such runs.")

WARNING = (
    "warning: this runs programs that a model wrote, on this machine: each in a process with limits on time, memory "
    "and files and without network where the kernel allows it, but no wall against malice; use a container for models "
    "that you do not trust"
)

MAX_TEXT = 100  # characters of a text in a table


@eval_app.command("infilling")
@fails_in_one_line
def infilling_command(
    url: Annotated[str, typer.Argument(help="server with /v1/completions and `suffix`")],
    set_name: Annotated[str, typer.Option("--set", help=f"one of {', '.join(SETS)}")] = "single-line",
    data: Annotated[Path | None, typer.Option(help="JSONL (.gz) file of the same form, instead of the own one")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only so many tasks, from the first")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="requests at a time")] = 4,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer; default: the set's, 64 or 256")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.0,
    healing: Annotated[str, typer.Option(help=f"{', '.join(HEALING)}; auto: as the server does by default")] = "auto",
    model: Annotated[str, typer.Option(help="model name; default: the first that the server lists")] = "",
    timeout: Annotated[float, typer.Option(min=0.001, help="seconds that a request may take")] = 600.0,
    out: Annotated[Path, typer.Option(help="where every task's result goes, as JSON")] = Path("infilling.json"),
) -> None:
    """HumanEval-Infilling: fill holes in 164 programs and run their tests."""
    kind = find_set(set_name)
    tasks = load_tasks(data or DATA / kind.file)[:limit]
    question = Question(
        url=url,
        model=model,
        max_tokens=max_tokens or kind.max_tokens,
        temperature=temperature,
        is_line=kind.is_line,
        healing=healing,
        timeout=timeout,
    )
    check_question(question)
    check_writable(out)
    report = new_report(set_name if data is None else data.name, question.base)
    report.settings = {
        "max_tokens": question.max_tokens,
        "temperature": temperature,
        "healing": healing,
        "concurrency": concurrency,
    }
    console = Console(stderr=True)
    console.print(WARNING, style="yellow", highlight=False, markup=False, soft_wrap=True)
    try:
        asyncio.run(_run(report, question, tasks, concurrency, console))
    except KeyboardInterrupt:
        report.is_complete = False
    order = {task.task_id: number for number, task in enumerate(tasks)}
    report.results.sort(key=lambda result: order[result.task_id])
    out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    _show_report(report, out, Console())
    if not report.is_complete:
        raise typer.Exit(EXIT_INTERRUPTED)
    if all(result.problem for result in report.results):
        raise InputError(f"not one request succeeded: {report.results[0].problem}")


@eval_app.command("compare")
@fails_in_one_line
def compare_command(
    first: Annotated[Path, typer.Argument(help="JSON file of a run")],
    second: Annotated[Path, typer.Argument(help="JSON file of another run over the same set")],
    show: Annotated[int, typer.Option(min=0, help="differing tasks to show")] = 20,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object with all of them")] = False,
) -> None:
    """Compare two runs task by task: equal texts, and McNemar's exact test of what passes."""
    result = compare(read_report(first), read_report(second))
    if json:
        print(msgspec.json.encode(result).decode())
    else:
        _show_comparison(result, (first.name, second.name), show, Console())


def new_report(set_name: str, by: str) -> Report:
    """Without results."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report(version=tabstop.__version__, created=created, set=set_name, by=by)


def read_report(path: Path) -> Report:
    """Raises InputError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except NOT_JSON as error:
        raise InputError(f"{path} is no file of `tabstop eval infilling`: {error}") from None


def check_writable(out: Path) -> None:
    """Raises ConfigError, before anything is measured for it."""
    try:
        with out.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another --out") from None


async def _run(report: Report, question: Question, tasks: list[Task], concurrency: int, console: Console) -> None:
    """Fills the report."""
    async with open_session(question) as session:
        listed = await first_model(session, question)
    report.model = question.model or listed
    with LiveCount(console, report.set, len(tasks)) as live:

        def keep(result: Result) -> None:
            report.results.append(result)
            live(result)

        await evaluate(question, tasks, concurrency, keep)


def _show_report(report: Report, out: Path, console: Console) -> None:
    num_tasks = len(report.results)
    share = report.num_passed / num_tasks if num_tasks else 0.0
    errors: dict[str, int] = {}
    for result in report.results:
        if result.error:
            errors[result.error] = errors.get(result.error, 0) + 1
    name = escape(f"{printable(report.set)}, {printable(report.model)}")
    console.print(
        f"{name}: [bold]{report.num_passed} of {num_tasks}[/bold] passed "
        f"({share:.1%})" + ("" if report.is_complete else ", interrupted"),
        highlight=False,
    )
    for error, count in sorted(errors.items(), key=lambda pair: -pair[1]):
        console.print(f"{count:6} {escape(error)}", highlight=False)
    console.print(f"results: {out}", highlight=False, markup=False)


def _show_comparison(result: Comparison, names: tuple[str, str], num_shown: int, console: Console) -> None:
    for index in (0, 1):
        only = f"{result.num_only[index]} only here"
        console.print(f"{names[index]}: {result.num_passed[index]} of {result.num_tasks} passed, {only}", markup=False)
    identical = f"{result.num_identical} of {result.num_tasks} ({result.identical_share:.1%})"
    console.print(f"identical texts: {identical}; McNemar, exact: p = {result.p_value:.3g}", highlight=False)
    if result.num_left_out:
        console.print(f"{result.num_left_out} tasks left out: not answered in both", highlight=False)
    if result.differences[:num_shown]:
        table = Table(Column("task", overflow="fold"), *names, show_lines=True)
        for difference in result.differences[:num_shown]:
            table.add_row(*(escape(cell) for cell in _row(difference)))
        console.print(table, highlight=False)
    if len(result.differences) > num_shown:
        console.print(f"{len(result.differences) - num_shown} more differ; --show, --json", highlight=False)


def _row(difference: Difference) -> list[str]:
    cells = [
        f"{printable(result.error) or 'passed'}\n{repr(result.completion)[:MAX_TEXT]}"
        for result in (difference.first, difference.second)
    ]
    return [printable(difference.task_id), *cells]
