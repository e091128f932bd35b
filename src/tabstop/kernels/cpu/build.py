"""Compiles the C++ library once for this machine and keeps it in the user's cache.

A library is known by a digest of everything that makes it what it is: source, flags, compiler and what the processor
can do (one made on another processor would die of an illegal instruction). A lock file lets one process compile while
others wait. What was compiled before is found in a few milliseconds. A file ends with the SHA-256 of what stands before
it: loading half a library ends the process by a signal.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = "tabstop.cpp"
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
COMPILERS = ("g++", "c++", "clang++")
STAGE = "compiling the CPU's kernels (once)"
TIMEOUT_SECONDS = 600
PACKAGE = "ziglang"  # Clang with all that it needs, from the package index
INSTALL_HINT = (
    "install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
    f"or, without root, pip install {PACKAGE}"
)

Progress = Callable[[str, int, int], None]


class CannotBuild(Exception):
    """Why there is no library, and what to do."""


def compiler() -> list[str] | None:
    """The command of a C++ compiler: the system's, else the one of a Python package."""
    if found := next((found for name in COMPILERS if (found := shutil.which(name))), None):
        return [found]
    package = importlib.util.find_spec(PACKAGE)
    return [str(Path(package.origin).with_name("zig")), "c++"] if package and package.origin else None


def cpu_flags() -> str:
    """What the processor says it can do."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def digest(command: list[str], flags: tuple[str, ...]) -> str:
    """What a library is known by. Raises CannotBuild."""
    made = hashlib.sha256()
    for file in [*sorted(SOURCES.glob("*.h")), SOURCES / MAIN]:
        made.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    version = said_by([*command, "--version"], 60)[1]
    for text in (*flags, *command, version, platform.machine(), cpu_flags()):
        made.update(text.encode() + b"\0")
    return made.hexdigest()[:24]


def build(folder: Path, progress: Progress | None = None, more_flags: tuple[str, ...] = ()) -> Path:
    """The library's path, compiled now unless `folder` has it. Raises CannotBuild.

    more_flags: go last, so that they win.
    """
    command = compiler()
    if command is None:
        raise CannotBuild(f"there is no C++ compiler: {INSTALL_HINT}")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = (*FLAGS, native, *more_flags)
    target = folder / f"tabstop-{digest(command, flags)}.so"
    try:
        if is_whole(target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not is_whole(target):  # another process may have made it meanwhile
                compile_library([*command, *flags], target, progress)
    except OSError as error:
        raise CannotBuild(f"cannot write {folder}: {error}; set XDG_CACHE_HOME to a folder that can be") from None
    return target


def is_whole(target: Path) -> bool:
    """Whether a library is there as it was written."""
    try:
        content = target.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def compile_library(command: list[str], target: Path, progress: Progress | None) -> None:
    """Under another name first: an interrupted compiler leaves no half of a library."""
    if progress:
        progress(STAGE, 0, 1)
    for rest in target.parent.glob("*.partial"):  # of processes that were killed: nobody else compiles now
        rest.unlink()
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        status, _, errors = said_by([*command, "-o", str(partial), str(SOURCES / MAIN)], TIMEOUT_SECONDS)
        if status:
            raise CannotBuild(f"{command[0]} failed; a newer one may do: {INSTALL_HINT}; it said: {errors[:600]}")
        with partial.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    if progress:
        progress(STAGE, 1, 1)


_at_work: set[subprocess.Popen[str]] = set()


def said_by(command: list[str], seconds: float) -> tuple[int, str, str]:
    """(status, output, errors) of a compiler, which has that long. Raises CannotBuild."""
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0
        ) as process:
            _at_work.add(process)
            try:
                output, errors = process.communicate(timeout=seconds)
            finally:
                _at_work.discard(process)
                end(process)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{command[0]} took more than {seconds} s") from None
    except OSError as error:
        raise CannotBuild(f"cannot run {command[0]}: {error}; {INSTALL_HINT}") from None
    return process.returncode, output, errors


def end(process: subprocess.Popen[str]) -> None:
    """Ends a compiler that is not over, with what it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def interrupt() -> None:
    """Ends a compiler that is at work: for a process that leaves without waiting for its threads."""
    for process in list(_at_work):
        end(process)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file's lock; the system drops it with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
