"""Runs programs that a model wrote: each in a process of its own, with limits, and nothing that it says is believed.

A program passes if it runs to its end: the child (child.py) then says a word that the program was never told. Ending
early, also with exit code 0, is no pass. The whole process group is killed at the end, whatever happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tabstop.evaluation import PASSED

CHILD = Path(__file__).parent / "child.py"
MAX_REPLY = 256  # bytes that are read of what a child says

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program."""

    seconds: float = 5.0  # by the clock
    memory: int = 1024 * MIB  # bytes of address space
    file_size: int = 0  # bytes of each file that is written: none
    num_files: int = 32  # open at once

    def as_resources(self) -> dict[str, int]:
        """By their names in Python's `resource`. No further process: the user's others count, too."""
        return {
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file_size,
            "RLIMIT_NOFILE": self.num_files,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
        }


DEFAULT_LIMITS = Limits()


async def run_program(source: str, limits: Limits = DEFAULT_LIMITS) -> str:
    """PASSED, or why not: the class of the exception, timeout, exit (it ended itself), output, or killed.

    Cancelling it kills the program.
    """
    word = secrets.token_hex(16)
    order = json.dumps({"word": word, "limits": limits.as_resources()}).encode() + b"\n"
    with tempfile.TemporaryDirectory(prefix="tabstop-eval-", ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "program.py"
        program.write_bytes(source.encode("utf-8", "surrogatepass"))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-B", str(CHILD), str(program)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": "/nonexistent", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(limits.seconds):
                reply = await _converse(process, order)
        except TimeoutError:
            return "timeout"
        finally:
            _kill_group(process.pid)
            await process.wait()
    return _judge(reply, word, process.returncode)


async def _converse(process: asyncio.subprocess.Process, order: bytes) -> bytes:
    """Gives the order and reads what is said, to the end or to the limit."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(order)
    process.stdin.close()
    reply = b""
    while len(reply) <= MAX_REPLY and (piece := await process.stdout.read(MAX_REPLY)):
        reply += piece
    if len(reply) <= MAX_REPLY:
        await process.wait()
    return reply


def _judge(reply: bytes, word: str, status: int | None) -> str:
    if reply == word.encode() and status == 0:
        return PASSED
    if len(reply) > MAX_REPLY:
        return "output"
    if status is not None and status < 0:
        return "timeout" if -status in (signal.SIGXCPU, signal.SIGALRM) else "killed"
    name = reply.decode("ascii", "replace")
    return name if re.fullmatch(r"[A-Za-z_]\w{0,63}", name) else "exit"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
