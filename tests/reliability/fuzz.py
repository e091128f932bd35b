"""Requests that nobody would think of: `python -m tests.reliability.fuzz --cases 20000`.

Schemathesis draws bodies that /openapi.json allows and bodies that it does not; each goes out as it is, and laid over a
request that works, so that what is odd gets as far as the engine. No answer may be a 5xx (but for the deadline that a
request asked for itself), none may hang, and afterwards the server must be idle.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.openapi import from_url

from tests.reliability.requests import draw_ask
from tests.reliability.server import Server, serving, write_model

HANG_SECONDS = 60.0
OPTIONS = ("--max-model-len", "128", "--log-level", "warning")
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
MOST_LAID_OVER = 3  # fields of a drawn body that replace those of a working one
NUM_OF_SMALL = 3  # cases of an operation without a body, or that is another one's under a second path


@dataclass
class Findings:
    """What came back."""

    statuses: Counter[str] = field(default_factory=Counter)  # by operation and status
    wrong: list[str] = field(default_factory=list)

    def take(self, label: str, response: requests.Response, sent: Any) -> None:
        self.statuses[f"{label} {response.status_code}"] += 1
        if response.status_code >= 500 and not _is_own_deadline(response):
            self.wrong.append(f"{label}: {response.status_code} {response.text[:300]} for {str(sent)[:2000]}")
        elif response.status_code >= 400 and not _has_error(response):
            self.wrong.append(f"{label}: {response.status_code} without an error object: {response.text[:300]}")

    @property
    def num_cases(self) -> int:
        return sum(self.statuses.values())


def _has_error(response: requests.Response) -> bool:
    try:
        return bool(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return False


def _is_own_deadline(response: requests.Response) -> bool:
    return response.status_code == 504 and _has_error(response) and "deadline" in response.text


class Fuzzer:
    """Draws and sends; `findings` grow."""

    def __init__(self, server: Server, number: int) -> None:
        self.findings = Findings()
        self._url = server.url
        self._session = requests.Session()
        self._generator = random.Random(number)
        self._number = number

    def try_operation(self, operation: Any, mode: GenerationMode, num_cases: int) -> None:
        """So many cases of one operation, fewer when there are no more."""

        @seed(self._number)
        @settings(
            max_examples=num_cases,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def try_each(case: Case) -> None:
            self._try_case(operation.label, case)

        try_each()

    def _try_case(self, label: str, case: Case) -> None:
        response = case.call(session=self._session, timeout=HANG_SECONDS)
        self.findings.take(label, response, case.body)
        if isinstance(case.body, dict) and "completion" in case.path:
            self._lay_over(label, case)

    def _lay_over(self, label: str, case: Case) -> None:
        names = list(case.body)
        few = self._generator.sample(names, min(len(names), self._generator.randint(1, MOST_LAID_OVER)))
        ask = draw_ask(self._generator)
        body = ask.body | {name: case.body[name] for name in few}
        response = self._session.post(self._url + ask.path, json=body, timeout=HANG_SECONDS)
        self.findings.take(f"over {ask.path}", response, body)


def attack(server: Server, num_cases: int, number: int = 0) -> Findings:
    """About so many requests, most of them to operations with a body."""
    fuzzer = Fuzzer(server, number)
    operations = [found.ok() for found in from_url(f"{server.url}/openapi.json").get_all_operations()]
    large = [operation for operation in operations if operation.body and operation.path not in _aliases(operations)]
    share = max(1, num_cases // (len(large) * len(MODES) * 3 // 2))  # half of them are sent twice
    for operation in operations:
        if operation in large:
            for mode in MODES:
                fuzzer.try_operation(operation, mode, share)
        else:
            fuzzer.try_operation(operation, GenerationMode.POSITIVE, min(share, NUM_OF_SMALL))
    assert not fuzzer.findings.wrong, "\n".join(fuzzer.findings.wrong[:5])
    server.assert_idle()
    assert server.process.poll() is None and server.status() == 200
    return fuzzer.findings


def _aliases(operations: list[Any]) -> set[str]:
    """Paths that are another one's without /v1."""
    paths = {operation.path for operation in operations}
    return {path for path in paths if f"/v1{path}" in paths}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    given_options = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(write_model(Path(folder) / "tiny"), *OPTIONS) as server:
        attack(server, 200, given_options.seed + 1)
        before, start = server.resident(), time.monotonic()
        findings = attack(server, given_options.cases, given_options.seed)
        growth = {name: value - before[name] for name, value in server.resident().items()}
        seconds = time.monotonic() - start
        print(f"schemathesis {schemathesis.__version__}: {findings.num_cases} requests in {seconds:.0f} s")
        print("\n".join(f"{name}: {count}" for name, count in sorted(findings.statuses.items())))
        print(f"no 5xx; memory grew by {growth} bytes")
        print(server.text[-3000:])
        assert server.stop() == 0
        server.assert_nothing_left()


if __name__ == "__main__":
    main()
