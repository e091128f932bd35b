"""Log lines for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from tabstop import logs
from tabstop.errors import InputError


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def write(format: str, level: str = "info") -> list[str]:
    stream = io.StringIO()
    logs.configure(logs.LogSettings(level, format), "engine", stream)
    log = logging.getLogger("tabstop.test")
    log.debug("hidden")
    log.info("served %d", 3, extra={"fields": {"num_tokens": 12}})
    try:
        raise ValueError("planted")
    except ValueError:
        log.exception("failed")
    return stream.getvalue().splitlines()


def test_text_is_one_readable_line() -> None:
    lines = write("text")
    assert lines[0][8:] == " info engine: served 3"
    assert lines[1][8:] == " error engine: failed"
    assert lines[-1] == f"ValueError: {logs.WITHHELD}" and "planted" not in lines[-1]
    assert lines[2] == "Traceback (most recent call last):" and 'raise ValueError("planted")' in lines[4]


def test_json_is_one_object_a_line() -> None:
    served, failed = (json.loads(line) for line in write("json"))
    assert served.pop("time").endswith("Z")
    assert served == {
        "level": "info",
        "process": "engine",
        "logger": "tabstop.test",
        "message": "served 3",
        "num_tokens": 12,
    }
    assert failed["exception"].endswith(f"ValueError: {logs.WITHHELD}")


def chained(*, shows_all: bool) -> str:
    """The last lines of each part of a chain and a group, outermost last."""
    try:
        try:
            raise KeyError("a secret")
        except KeyError as error:
            raise RuntimeError("a step failed") from error
    except RuntimeError as error:
        group = ExceptionGroup("a secret", [error, InputError("n is 7"), ValueError()])
    text = logs.Formatter("engine", shows_all=shows_all).formatException((type(group), group, None))
    return "\n".join(line for line in text.splitlines() if line and line[0] not in " T")


def test_only_messages_that_quote_nothing_are_shown() -> None:
    assert chained(shows_all=False).splitlines() == [
        f"ExceptionGroup: {logs.WITHHELD}",
        f"KeyError: {logs.WITHHELD}",
        "RuntimeError: a step failed",
        "InputError: n is 7",
        "ValueError",
    ]
    assert chained(shows_all=True).splitlines()[1] == "KeyError: 'a secret'"


UNCAUGHT = """
import asyncio, sys, threading
from tabstop import logs
logs.configure(logs.LogSettings(), "front end")
def fail(): raise ValueError("planted")
thread = threading.Thread(target=fail)
thread.start(); thread.join()
class Late:
    def __del__(self): fail()
Late()
async def main():
    asyncio.get_running_loop().set_exception_handler(logs.on_loop_error)
    async def failing(): fail()
    task = asyncio.create_task(failing()); await asyncio.sleep(0); del task
    asyncio.get_running_loop().call_soon(fail); await asyncio.sleep(0)
asyncio.run(main())
import gc; gc.collect()
fail()
"""


def test_what_nobody_catches_is_logged_the_same_way() -> None:
    done = subprocess.run([sys.executable, "-c", UNCAUGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count(f"ValueError: {logs.WITHHELD}") == 5 and "planted" not in done.stderr
    said = ("a thread failed", "could not be raised", "never retrieved", "Exception in callback", "the process failed")
    assert all(text in done.stderr for text in said)


def test_the_level_hides_what_is_below() -> None:
    assert any("hidden" in line for line in write("text", "debug"))
    assert not any("served" in line for line in write("text", "error"))


def test_warnings_are_logged_too() -> None:
    stream = io.StringIO()
    logs.configure(logs.LogSettings(), "engine", stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("look out", UserWarning, stacklevel=1)
    assert "look out" in stream.getvalue()
