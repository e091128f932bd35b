"""Exit codes of the benchmark's commands, and user errors as one line on stderr."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from tabstop.errors import TabstopError

EXIT_BAD_INPUT, EXIT_INVALID, EXIT_INTERRUPTED = 2, 3, 130


def fails_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """User errors as one line on stderr and exit code 2; SIGTERM ends a command like Ctrl-C, so that servers stop."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            command(*args, **kwargs)
        except TabstopError as error:
            Console(stderr=True).print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return wrapped
