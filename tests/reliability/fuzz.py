"""Requests that nobody would think of: `python -m tests.reliability.fuzz --cases 20000`.

Schemathesis draws bodies that /openapi.json allows and bodies that it does not (cases.py); each goes out as it is, and
laid over a request that works, so that what is odd gets as far as the engine; several at once. No answer may be
a 5xx or a stream that ends in one (but for the deadline that a request asked for itself), none may hang, and afterwards
the server must be idle.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
import urllib3

from tabstop.errors import from_code
from tests.reliability.cases import MODES, Case, draw, draw_small, operations
from tests.reliability.requests import draw_ask
from tests.reliability.server import Server, serving, write_model

HANG_SECONDS = 60.0
NUM_SENDERS = 8
OPTIONS = ("--max-model-len", "128", "--log-level", "warning")
MOST_LAID_OVER = 3  # fields of a drawn body that replace those of a working one
MOST_TOKENS = 12  # that a working request asks for: odd is how it asks, not how long it takes


@dataclass
class Findings:
    """What came back."""

    num_cases: int = 0
    statuses: Counter[str] = field(default_factory=Counter)  # by operation and status
    wrong: list[str] = field(default_factory=list)

    @property
    def num_requests(self) -> int:
        return sum(self.statuses.values())

    def num_with(self, status: int) -> int:
        return sum(count for name, count in self.statuses.items() if name.endswith(f" {status}"))

    def take(self, label: str, status: int, content: bytes, sent: bytes | None) -> None:
        self.statuses[f"{label} {status}"] += 1
        complaint = judged(status, content)
        if complaint:
            self.wrong.append(f"{label}: {complaint} for {str(sent)[:2000]}")


def judged(status: int, content: bytes) -> str:
    """What is wrong with an answer; nothing when nothing is."""
    text = content.decode(errors="replace")
    if status >= 500 and not (status == 504 and "deadline" in text and _error_code(text)):
        return f"{status} {text[:300]}"
    if status >= 400:
        return "" if _error_code(text) else f"{status} without an error object: {text[:300]}"
    for line in text.splitlines():
        code = _error_code(line.removeprefix("data: ")) if line.startswith("data: ") else ""
        if code and code != "deadline_exceeded" and from_code(code, "").status >= 500:
            return f"a stream that ends with {line[:300]}"
    return ""


def _error_code(text: str) -> str:
    """Of an error object with a message; nothing for anything else."""
    try:
        error = json.loads(text)["error"]
        return str(error["code"]) if error["message"] else ""
    except (ValueError, LookupError, TypeError):
        return ""


class Fuzzer:
    """Sends what it is given, NUM_SENDERS at once; `findings` grow."""

    def __init__(self, server: Server, number: int) -> None:
        self.findings = Findings()
        self._pool = urllib3.HTTPConnectionPool(
            "127.0.0.1", server.port, maxsize=NUM_SENDERS, block=True, retries=False, timeout=HANG_SECONDS
        )
        self._senders = ThreadPoolExecutor(NUM_SENDERS)
        self._room = threading.Semaphore(4 * NUM_SENDERS)
        self._lock = threading.Lock()
        self._sent: list[Future[None]] = []
        self._number = number

    def try_case(self, case: Case) -> None:
        """Returns before it is answered, but not while many others wait."""
        self._room.acquire()
        self.findings.num_cases += 1
        self._sent.append(self._senders.submit(self._try, case))
        self._sent[-1].add_done_callback(lambda _: self._room.release())

    def finish(self) -> Findings:
        """When all are answered."""
        self._senders.shutdown(wait=True)
        for future in self._sent:
            future.result()
        return self.findings

    def _try(self, case: Case) -> None:
        self._send(case.operation, case.method, case.target, case.content)
        value = case.value
        if isinstance(value, dict) and "completion" in case.target:
            self._lay_over(case, value)

    def _lay_over(self, case: Case, value: dict[str, Any]) -> None:
        generator = random.Random(f"{self._number} {case.target} {case.body}")
        few = generator.sample(list(value), min(len(value), generator.randint(1, MOST_LAID_OVER)))
        ask = draw_ask(generator, MOST_TOKENS)
        body = ask.body | {name: value[name] for name in few}
        self._send(f"over {ask.path}", "POST", ask.path, json.dumps(body).encode())

    def _send(self, label: str, method: str, target: str, body: bytes | None) -> None:
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            response = self._pool.request(method, target, body=body, headers=headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            with self._lock:
                self.findings.wrong.append(f"{label}: no answer, {error!r} for {str(body)[:2000]}")
            return
        with self._lock:
            self.findings.take(label, response.status, response.data, body)


def replay(server: Server, cases: Iterable[Case]) -> Findings:
    """Sends what was drawn before."""
    fuzzer = Fuzzer(server, 0)
    for case in cases:
        fuzzer.try_case(case)
    return _checked(server, fuzzer)


def attack(server: Server, num_requests: int, number: int = 0) -> Findings:
    """Draws and sends: about so many requests, most of them to operations with a body."""
    fuzzer = Fuzzer(server, number)
    large, small = operations(requests.get(f"{server.url}/openapi.json", timeout=HANG_SECONDS).json())
    share = max(1, num_requests // (len(large) * len(MODES) * 3 // 2))  # half of them are sent twice
    for operation in large:
        for mode in MODES:
            draw(operation, mode, share, number, fuzzer.try_case)
    for operation in small:
        draw_small(operation, number, fuzzer.try_case)
    return _checked(server, fuzzer)


def _checked(server: Server, fuzzer: Fuzzer) -> Findings:
    findings = fuzzer.finish()
    assert not findings.wrong, f"{len(findings.wrong)} wrong answers:\n" + "\n".join(findings.wrong[:5])
    server.assert_idle()
    assert server.process.poll() is None and server.status() == 200
    return findings


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(write_model(Path(folder) / "tiny"), *OPTIONS) as server:
        attack(server, 200, given.seed + 1)
        before, start = server.resident(), time.monotonic()
        findings = attack(server, given.cases, given.seed)
        growth = {name: value - before[name] for name, value in server.resident().items()}
        seconds = time.monotonic() - start
        print(f"schemathesis {schemathesis.__version__}: {findings.num_cases} cases drawn, ", end="")
        print(f"{findings.num_requests} requests in {seconds:.0f} s, {time.process_time():.0f} s of a core here")
        print("\n".join(f"{name}: {count}" for name, count in sorted(findings.statuses.items())))
        print(f"no 5xx; memory grew by {growth} bytes")
        print(server.text[-3000:])
        assert server.stop() == 0
        server.assert_nothing_left()


if __name__ == "__main__":
    main()
