"""What schemathesis draws from /openapi.json, as it goes over the wire, and the drawn cases that CI replays.

Drawing a case takes hypothesis some hundred choices, each through several layers of Python: 3 ms of a core for a hole,
50 for a chat. So 2,000 were drawn once and are kept (cases.jsonl.xz); they are sent again and again, to whatever the
server is today. What the description has gained since they were drawn, `missing` finds; then make them again:

    PYTHONPATH=src python -m tests.reliability.cases
"""

from __future__ import annotations

import json
import lzma
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.openapi import from_dict

from tests.reliability.forms import with_forms
from tests.reliability.server import serving, write_model

STORED = Path(__file__).parent / "cases.jsonl.xz"
NUM_STORED = 2000
MOST_CHARACTERS = 700  # of a body that is kept: larger ones are drawn live only
MOST_ROUNDS = 40  # of drawing, until every field is there
NUM_OF_SMALL = 3  # cases of an operation without a body, or that is another one's under a second path
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
REMAKE = "PYTHONPATH=src python -m tests.reliability.cases"


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `mode`: positive (the description allows it) or negative."""

    mode: str
    operation: str  # its method and path as described
    target: str  # the path that is asked for, with what stands behind it
    body: str | None  # as JSON

    @property
    def method(self) -> str:
        return self.operation.split()[0]

    @property
    def value(self) -> Any:
        return None if self.body is None else json.loads(self.body)


# ---- drawing


def operations(description: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Those with a body of their own; and the others."""
    found = [entry.ok() for entry in from_dict(with_forms(description)).get_all_operations()]
    paths = {operation.path for operation in found}
    large = [operation for operation in found if operation.body and f"/v1{operation.path}" not in paths]
    return large, [operation for operation in found if operation not in large]


def draw(operation: Any, mode: GenerationMode, num_cases: int, number: int, take: Callable[[Case], None]) -> None:
    """So many cases of one operation, fewer when there are no more. `number` seeds."""

    @seed(number)
    @settings(
        max_examples=num_cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def take_each(case: schemathesis.Case) -> None:
        take(_on_the_wire(operation.label, mode, case))

    take_each()


def draw_small(operation: Any, number: int, take: Callable[[Case], None]) -> None:
    draw(operation, GenerationMode.POSITIVE, NUM_OF_SMALL, number, take)


def _on_the_wire(label: str, mode: GenerationMode, case: schemathesis.Case) -> Case:
    prepared = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    body = prepared.body.decode() if isinstance(prepared.body, bytes) else prepared.body
    return Case(mode.value, label, prepared.path_url, body)


# ---- what is described


def fields(description: dict[str, Any]) -> dict[str, set[str]]:
    """By operation: the fields of its body, and with a dot before them those of the objects inside it."""
    found = {}
    for path, methods in description["paths"].items():
        for method, entry in methods.items():
            content = entry.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            reached = list(_reached(schema, description, set()))
            inner = {f".{name}" for part in reached[1:] for name in part}
            found[f"{method.upper()} {path}"] = inner | set(reached[0] if reached else ())
    return found


def _reached(schema: Any, description: dict[str, Any], seen: set[str]) -> Iterator[list[str]]:
    """The names of properties of every object that a schema leads to, its own first."""
    if isinstance(schema, list):
        for part in schema:
            yield from _reached(part, description, seen)
    elif isinstance(schema, dict):
        name = schema.get("$ref", "").rpartition("/")[2]
        if name and name not in seen:
            seen.add(name)
            yield from _reached(description["components"]["schemas"][name], description, seen)
        if "properties" in schema:
            yield list(schema["properties"])
        yield from _reached([part for key, part in schema.items() if key != "default"], description, seen)


def _named(value: Any, depth: int = 0) -> set[str]:
    """The fields of a body, written as `fields` writes them."""
    if isinstance(value, list):
        return set().union(*(_named(part, depth + 1) for part in value))
    if not isinstance(value, dict):
        return set()
    own = {f".{name}" if depth else name for name in value}
    return own.union(*(_named(part, depth + 1) for part in value.values()))


def missing(description: dict[str, Any], cases: Iterable[Case]) -> list[str]:
    """Operations without a case, fields without an allowed value in one, and operations that are no more."""
    described = fields(description)
    covered: dict[str, set[str]] = {}
    for case in cases:
        named = covered.setdefault(case.operation, set())
        if case.mode == GenerationMode.POSITIVE.value:
            named |= _named(case.value)
    large = {operation.label for operation in operations(description)[0]}
    found = [f"{label}: no case" for label in described if label not in covered]
    found += [f"{label}: is no more" for label in covered if label not in described]
    return found + [
        f"{label}: {name}" for label in sorted(large & set(covered)) for name in described[label] - covered[label]
    ]


# ---- what is kept


def stored() -> list[Case]:
    """The cases of cases.jsonl.xz."""
    lines = lzma.decompress(STORED.read_bytes()).decode().split("\n")
    rows = [json.loads(line) for line in lines]
    return [Case(*row[:3], json.dumps(row[3]) if len(row) > 3 else None) for row in rows]


def make(description: dict[str, Any]) -> list[Case]:
    """NUM_STORED cases and a few more, if fields ask for them."""
    large, small = operations(description)
    found: dict[Case, None] = {}
    for operation in small:
        draw_small(operation, 0, found.setdefault)
    share = -(-(NUM_STORED - len(found)) // (len(large) * len(MODES)))
    for operation in large:
        needed = fields(description)[operation.label]
        for mode in MODES:
            found |= dict.fromkeys(_draw_many(operation, mode, share, needed))
            needed = set()
    return list(found)


def _draw_many(operation: Any, mode: GenerationMode, share: int, needed: set[str]) -> list[Case]:
    """`share` different small cases, and those with what they lack of `needed`."""
    found: dict[Case, None] = {}
    lacking = set(needed)

    def take(case: Case) -> None:
        if len(case.body or "") > MOST_CHARACTERS:
            return
        named = _named(case.value)
        if len(found) < share or named & lacking:
            found[case] = None
            lacking.difference_update(named)

    for number in range(MOST_ROUNDS):
        if len(found) >= share and not lacking:
            return list(found)
        draw(operation, mode, share, number, take)
    print(f"{operation.label} {mode.value}: {len(found)} of {share} cases; without {sorted(lacking)}")
    return list(found)


def write(cases: list[Case]) -> None:
    """Characters as they are: escapes would take twice the room."""
    rows = [(*astuple(case)[:3], *([] if case.body is None else [case.value])) for case in cases]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    STORED.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, serving(write_model(Path(folder) / "tiny")) as server:
        description = requests.get(f"{server.url}/openapi.json", timeout=60).json()
    cases = make(description)
    write(cases)
    print(f"{len(cases)} cases, {STORED.stat().st_size} bytes; missing: {missing(description, cases) or 'nothing'}")


if __name__ == "__main__":
    main()
