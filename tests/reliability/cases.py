"""What schemathesis draws from /openapi.json, as it goes over the wire, and the drawn cases that CI replays.

Drawing a case takes hypothesis some hundred choices, each through several layers of Python: 3 ms of a core for a hole,
50 for a chat. So 2,000 were drawn once and are kept (cases.jsonl.xz); they are sent again and again, to whatever the
server is today. What the description has gained since they were drawn, `missing` finds; then make them again:

    PYTHONPATH=src python -m tests.reliability.cases
"""

from __future__ import annotations

import argparse
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
MOST_ROUNDS = 4  # of drawing, until there are enough: some operations have few small cases
NUM_PER_MISSING = 20  # cases drawn for a field that no other names
NUM_OF_SMALL = 3  # cases of an operation without a body, or that is another one's under a second path
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
REMAKE = "PYTHONPATH=src python -m tests.reliability.cases"


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `mode`: positive (the description allows it) or negative."""

    mode: str
    operation: str  # its method and path as described
    target: str  # the path that is asked for, with what stands behind it
    body: str | None  # JSON, mostly; bytes that are no UTF-8 as surrogates

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else self.body.encode("utf-8", "surrogateescape")

    @property
    def method(self) -> str:
        return self.operation.split()[0]

    @property
    def value(self) -> Any:
        """What the body says; None when it is none, or no JSON."""
        try:
            return json.loads(self.body or "null")
        except ValueError:
            return None


# ---- drawing


def operations(description: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Those with a body of their own; and the others."""
    found = _all(with_forms(description))
    paths = {operation.path for operation in found}
    large = [operation for operation in found if operation.body and f"/v1{operation.path}" not in paths]
    return large, [operation for operation in found if operation not in large]


def _all(description: dict[str, Any]) -> list[Any]:
    return [entry.ok() for entry in from_dict(description).get_all_operations()]


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
    body = prepared.body.decode("utf-8", "surrogateescape") if isinstance(prepared.body, bytes) else prepared.body
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
    described, cases = fields(description), list(cases)
    labels = {case.operation for case in cases}
    large = {operation.label for operation in operations(description)[0]}
    found = [f"{label}: no case" for label in described if label not in labels]
    found += [f"{label}: is no more" for label in sorted(labels) if label not in described]
    for label in sorted(large & labels):
        found += [f"{label}: {name}" for name in missing_fields(description, cases, label)]
    return found


def missing_fields(description: dict[str, Any], cases: Iterable[Case], label: str) -> list[str]:
    """Fields of an operation's body that none of its positive cases names."""
    positive = [case for case in cases if case.operation == label and case.mode == GenerationMode.POSITIVE.value]
    return sorted(fields(description)[label].difference(*(_named(case.value) for case in positive)))


# ---- what is kept


def stored() -> list[Case]:
    """The cases of cases.jsonl.xz."""
    lines = lzma.decompress(STORED.read_bytes()).decode().split("\n")
    return [Case(*head, body if is_text else json.dumps(body)) for *head, is_text, body in map(json.loads, lines)]


def make(description: dict[str, Any]) -> list[Case]:
    """NUM_STORED cases."""
    large, small = operations(description)
    found: dict[Case, None] = {}
    for operation in small:
        draw_small(operation, 0, found.setdefault)
    for number in range(MOST_ROUNDS):
        share = (NUM_STORED - len(found)) // (len(large) * len(MODES)) + 1
        for operation in large:
            for mode in MODES:
                found |= dict.fromkeys(_small_cases(operation, mode, share, number))
                print(f"{operation.label}, {mode.value}: {len(found)} cases by now", flush=True)
        if len(found) >= NUM_STORED:
            break
    return list(found)


def _small_cases(operation: Any, mode: GenerationMode, most: int, number: int) -> list[Case]:
    """At most so many different ones; hypothesis repeats itself, so twice as many are drawn."""
    found: dict[Case, None] = {}
    draw(operation, mode, 2 * most, number, found.setdefault)
    return [case for case in found if len(case.body or "") <= MOST_CHARACTERS][-most:]


def _with_missing(description: dict[str, Any], cases: list[Case]) -> list[Case]:
    """A case for each field that none of the others names: drawn as if it had to be there."""
    added: list[Case] = []
    large = {operation.label: operation for operation in operations(description)[0]}
    for label in large.keys() - {case.operation for case in cases}:
        for mode in MODES:
            added += _small_cases(large[label], mode, NUM_PER_MISSING, 0)
    for line in missing(description, [*cases, *added]):
        label, _, name = line.partition(": ")
        if name in missing_fields(description, [*cases, *added], label):
            narrowed = with_forms(description, required=name.removeprefix("."))
            (operation,) = [entry for entry in _all(narrowed) if entry.label == label]
            drawn: list[Case] = []
            draw(operation, GenerationMode.POSITIVE, NUM_PER_MISSING, 0, drawn.append)
            named = [case for case in drawn if name in _named(case.value)]
            added += sorted(named, key=lambda case: len(case.body or ""))[:1]
    return added


def write(cases: list[Case]) -> None:
    """JSON as its value, with characters as they are: escapes would take twice the room. All else as text."""
    rows = []
    for case in cases:
        *head, body = astuple(case)
        is_text = body is None or json.dumps(case.value) != body
        rows.append(json.dumps([*head, is_text, body if is_text else case.value], ensure_ascii=is_text))
    text = "\n".join(rows)
    STORED.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    options = argparse.ArgumentParser(description="Adds what is missing and drops what is no more.")
    options.add_argument("--anew", action="store_true", help="draw all cases anew: five minutes of a core")
    given_options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(write_model(Path(folder) / "tiny")) as server:
        description = requests.get(f"{server.url}/openapi.json", timeout=60).json()
    if given_options.anew or not STORED.exists():
        cases = make(description)
    else:
        cases = [case for case in stored() if case.operation in fields(description)]
        for operation in operations(description)[1]:
            if operation.label not in {case.operation for case in cases}:
                draw_small(operation, 0, cases.append)
    cases += _with_missing(description, cases)
    write(cases)
    print(f"{len(cases)} cases, {STORED.stat().st_size} bytes; missing: {missing(description, cases) or 'nothing'}")


if __name__ == "__main__":
    main()
