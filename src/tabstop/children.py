"""A child process of the supervisor: how it is started, told things, listened to and ended.

Children are fresh interpreters (`python -m module`), never forks: no torch, lock or event loop is inherited. They lead
process groups of their own, so that Ctrl-C on the terminal reaches the supervisor alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from tabstop import pipes
from tabstop.config import child_environment
from tabstop.pipes import Event

log = logging.getLogger(__name__)


class Child:
    """A running child. Its stdin is the way down, its stdout the way up, its stderr is ours."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    @staticmethod
    async def start(name: str, module: str, settings: Any, descriptors: Sequence[int] = ()) -> Child:
        """Starts `python -m module`, which inherits `descriptors` and reads `settings` from stdin."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=descriptors,
            env=child_environment(),
            process_group=0,
        )
        child = Child(name, process)
        child._write(pipes.to_line(settings))
        return child

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, event: Event) -> None:
        """Sends an event; silently when the child is gone."""
        self._write(pipes.to_line(event))

    def _write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.process.stdin.write(line)

    async def events(self) -> AsyncIterator[Event]:
        """What the child tells, until it closes its stdout (it ends, or has ended)."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                yield pipes.to_event(line)
            except msgspec.DecodeError:
                log.warning("%s wrote something that is no event", self.name)

    async def wait(self) -> int:
        """Its exit code; negative for a signal."""
        return await self.process.wait()

    def end(self) -> None:
        """Ends its stdin: it shall exit at once."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def finish(self, patience: float) -> None:
        """Waits for its exit, `patience` seconds at most, then kills it. Leaves no zombie."""
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            log.warning("%s did not end within %.1f s; killing it", self.name, patience)
            self.kill()
            await self.process.wait()
