"""How every process logs: readable lines, or one JSON object a line (--log-format json), always on stderr.

Knows nothing of what is logged; that no prompt and no key gets here is the duty of who calls (--log-prompts is read by
the service). A record's message is complete for people; the same in parts, for machines, travels by
`extra={"fields": {...}}` and shows in JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import msgspec

TALKATIVE = ("httpx", "httpcore", "huggingface_hub", "filelock", "asyncio", "uvicorn")
"""Loggers of libraries that say something of every request; only their warnings are shown."""


class LogSettings(msgspec.Struct, frozen=True):
    """The part of ServerConfig that every process needs."""

    level: str = "info"
    format: str = "text"


class TextFormatter(logging.Formatter):
    """`12:00:01 info engine: message`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower()} {self._process}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message, exception, and the record's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry | getattr(record, "fields", {}), default=str)


def configure(settings: LogSettings, process: str, stream: Any = None) -> None:
    """Sends every logger of this process, warnings included, to stderr (or `stream`) in the chosen form."""
    handler = logging.StreamHandler(stream or sys.stderr)
    formatter = JsonFormatter if settings.format == "json" else TextFormatter
    handler.setFormatter(formatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    logging.captureWarnings(True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
