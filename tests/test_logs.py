"""Log lines for people and for machines."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from tabstop import logs


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
    assert lines[-1] == "ValueError: planted"


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
    assert "ValueError: planted" in failed["exception"]


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
