"""The sets of tasks that come with the package, and files of the same form.

From openai/human-eval-infilling, unchanged (data/LICENSE).
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tabstop.errors import ConfigError, InputError
from tabstop.evaluation import NOT_JSON, Task

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class TaskSet:
    """How the answers of a set are asked for."""

    file: str
    max_tokens: int
    is_line: bool = False  # the hole is one whole line: the answer ends with its line end


SETS = {
    "single-line": TaskSet("HumanEval-SingleLineInfilling.jsonl.gz", max_tokens=64, is_line=True),
    "random-span-light": TaskSet("HumanEval-RandomSpanInfillingLight.jsonl.gz", max_tokens=256),
}
"""By name: 1,033 holes of a line each, and 164 that begin and end anywhere, also within a token."""


def find_set(name: str) -> TaskSet:
    """Raises ConfigError."""
    if name not in SETS:
        raise ConfigError(f"--set is {name!r}; choose one of {', '.join(SETS)}")
    return SETS[name]


def load_tasks(path: Path) -> list[Task]:
    """The tasks of a JSONL file, gzipped if its name ends with .gz. Raises InputError."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    tasks: list[Task] = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            tasks += [msgspec.json.decode(line, type=Task)] if line.strip() else []
        except NOT_JSON as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not tasks:
        raise InputError(f"{path} holds no task")
    if len({task.task_id for task in tasks}) < len(tasks):
        raise InputError(f"{path} has a task_id twice")
    return tasks
