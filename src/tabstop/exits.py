"""Exit codes of every process and command (docs/structure.md), and a command's user errors as one line on stderr."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from typing import Any

from tabstop.errors import TabstopError

EXIT_STOPPED = 0  # done, or asked to stop
EXIT_CANNOT_START = 2  # or: bad input
EXIT_INVALID = 3  # of the benchmark: the client was the bottleneck
EXIT_BUG = 70
EXIT_INTERRUPTED = 130

GRACE = 3.0  # seconds after a Ctrl-C in which another one is the same wish, not one to lose the report


def fails_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """User errors as one line on stderr and exit code 2; SIGTERM ends a command like Ctrl-C, so that servers stop.

    An impatient second Ctrl-C does not stop the report from being written.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        import typer  # here: the engine's process needs the codes alone
        from rich.console import Console
        from rich.markup import escape

        interrupt = _interrupt_once()
        before = [(number, signal.signal(number, interrupt)) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            command(*args, **kwargs)
        except TabstopError as error:
            Console(stderr=True).print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_CANNOT_START) from None
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
