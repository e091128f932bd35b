"""Compiles the C++ library once for this machine and keeps it in the user's cache.

A library is known by a digest of everything that makes it what it is: source, flags, compiler and what the processor
can do (one made on another processor would die of an illegal instruction). A lock file lets one process compile while
others wait. What was compiled before is found in a few milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
MAIN = "tabstop.cpp"
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
COMPILERS = ("g++", "c++", "clang++")
STAGE = "compiling the CPU's kernels (once)"
TIMEOUT_SECONDS = 600
INSTALL_HINT = (
    "install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
)

Progress = Callable[[str, int, int], None]


class CannotBuild(Exception):
    """Why there is no library, and what to do."""


def compiler() -> str | None:
    """The path of a C++ compiler."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def cpu_flags() -> str:
    """What the processor says it can do."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.partition(":")[2].split()))
    return platform.processor()


def digest(compiler_path: str, flags: tuple[str, ...]) -> str:
    """What a library is known by."""
    made = hashlib.sha256()
    for file in [*sorted(SOURCES.glob("*.h")), SOURCES / MAIN]:
        made.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    version = subprocess.run([compiler_path, "--version"], capture_output=True, text=True, timeout=60)
    for text in (*flags, compiler_path, version.stdout, platform.machine(), cpu_flags()):
        made.update(text.encode() + b"\0")
    return made.hexdigest()[:24]


def build(folder: Path, progress: Progress | None = None, more_flags: tuple[str, ...] = ()) -> Path:
    """The library's path, compiled now unless `folder` has it. Raises CannotBuild.

    more_flags: go last, so that they win.
    """
    path = compiler()
    if path is None:
        raise CannotBuild(f"there is no C++ compiler: {INSTALL_HINT}")
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    flags = (*FLAGS, native, *more_flags)
    target = folder / f"tabstop-{digest(path, flags)}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not target.exists():  # another process may have made it meanwhile
                compile_library([path, *flags], target, progress)
    except OSError as error:
        raise CannotBuild(f"cannot write {folder}: {error}") from None
    return target


def compile_library(command: list[str], target: Path, progress: Progress | None) -> None:
    """Under another name first: an interrupted compiler leaves no half of a library."""
    if progress:
        progress(STAGE, 0, 1)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [*command, "-o", str(partial), str(SOURCES / MAIN)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            raise CannotBuild(f"{command[0]} failed; a newer one may do: {INSTALL_HINT}; it said: {done.stderr[:600]}")
        partial.replace(target)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{command[0]} took more than {TIMEOUT_SECONDS} s") from None
    finally:
        partial.unlink(missing_ok=True)
    if progress:
        progress(STAGE, 1, 1)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file's lock; the system drops it with the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
