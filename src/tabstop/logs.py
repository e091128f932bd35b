"""How every process logs: readable lines, or one JSON object a line (--log-format json), always on stderr.

Knows nothing of what is logged; that no prompt and no key gets here is the duty of who calls (--log-prompts is read by
the service). A record's message is complete for people; the same in parts, for machines, travels by
`extra={"fields": {...}}` and shows in JSON. Of exceptions the traceback is shown, but the message only of kinds that do
not quote what they stumbled over: a ValueError may hold a part of a prompt.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import msgspec

from tabstop.errors import TabstopError

log = logging.getLogger(__name__)

TALKATIVE = ("httpx", "httpcore", "huggingface_hub", "filelock", "asyncio", "uvicorn")
"""Loggers of libraries that say something of every request; only their warnings are shown."""


SHOWN = (TabstopError, OSError, RuntimeError, MemoryError, ImportError, AssertionError, SystemExit)
"""Exceptions whose messages say what went wrong, not what with."""

WITHHELD = "(message withheld: it may quote a request; --log-prompts shows it)"


class LogSettings(msgspec.Struct, frozen=True):
    """The part of ServerConfig that every process needs."""

    level: str = "info"
    format: str = "text"
    prompts: bool = False  # exceptions may quote them, too


class Formatter(logging.Formatter):
    """What both forms share: the process's name, and how an exception shows."""

    def __init__(self, process: str, *, shows_all: bool = False) -> None:
        super().__init__()
        self._process = process
        self._shows_all = shows_all

    def formatException(self, ei: Any) -> str:
        """The whole chain, outermost last, as the interpreter prints it."""
        return "".join(self._lines(ei[1])).rstrip("\n") if ei[1] is not None else ""

    def _lines(self, error: BaseException) -> Iterator[str]:
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is not None:
            yield from self._lines(before)
            yield "\nThen:\n\n"
        if error.__traceback__ is not None:
            yield "Traceback (most recent call last):\n"
            yield from traceback.format_tb(error.__traceback__)
        message = str(error) if self._shows_all or isinstance(error, SHOWN) else WITHHELD if str(error) else ""
        yield f"{type(error).__qualname__}{': ' if message else ''}{message}\n"
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                yield from self._lines(part)


class TextFormatter(Formatter):
    """`12:00:01 info engine: message`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower()} {self._process}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(Formatter):
    """One object a line: time (UTC), level, process, logger, message, exception, and the record's own fields."""

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
    handler.setFormatter(formatter(process, shows_all=settings.prompts))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())
    logging.captureWarnings(True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    if stream is None:
        _catch_the_rest()


def _catch_the_rest() -> None:
    """What nobody caught goes the same way: the interpreter would print it with its message."""

    def on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("the process failed", exc_info=error)

    def on_thread_error(args: threading.ExceptHookArgs) -> None:
        log.error("a thread failed", exc_info=args.exc_value)

    def on_unraisable(args: Any) -> None:
        log.error("an error could not be raised", exc_info=args.exc_value)

    sys.excepthook, threading.excepthook, sys.unraisablehook = on_error, on_thread_error, on_unraisable


def on_loop_error(loop: Any, context: dict[str, Any]) -> None:
    """An event loop's exception handler: asyncio's own writes the exception's message into the line."""
    log.error("%s", context.get("message", "the event loop failed"), exc_info=context.get("exception"))
