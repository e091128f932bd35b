"""Exit codes of the benchmark's commands, and user errors as one line on stderr."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from tabstop.errors import TabstopError

GRACE = 3.0  # seconds after a Ctrl-C in which another one is the same wish, not one to lose the report
EXIT_BAD_INPUT, EXIT_INVALID, EXIT_INTERRUPTED = 2, 3, 130


def fails_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """User errors as one line on stderr and exit code 2; SIGTERM ends a command like Ctrl-C, so that servers stop.

    An impatient second Ctrl-C does not stop the report from being written.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        interrupt = _interrupt_once()
        before = [(number, signal.signal(number, interrupt)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            command(*args, **kwargs)
        except TabstopError as error:
            Console(stderr=True).print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    return wrapped


def _interrupt_once() -> Callable[[int, Any], None]:
    """A signal handler that raises KeyboardInterrupt, but not again within GRACE."""
    raised = float("-inf")

    def handle(_number: int, _frame: Any) -> None:
        nonlocal raised
        if time.monotonic() - raised >= GRACE:
            raised = time.monotonic()
            raise KeyboardInterrupt

    return handle
