"""Files that processes map into their memory. Their room on the disk is taken first: who writes to a mapped page for
which the disk has no room is killed (SIGBUS), and so would be every front end, again and again, on a full disk.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def reserve(descriptor: int, num_bytes: int) -> None:
    """Makes an open file at least so long, with room for every byte; what stands in it stays.

    Raises OSError when there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    elif os.fstat(descriptor).st_size < num_bytes:  # macOS has no such call
        os.ftruncate(descriptor, num_bytes)


def map_reserved(path: Path, num_bytes: int) -> mmap.mmap:
    """A file that several processes map: made, of zeros, by whoever comes first. Raises OSError without room for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        reserve(descriptor, num_bytes)
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def make_reserved(paths: Iterable[Path], num_bytes: int) -> None:
    """New files of zeros, all of them or none. Raises OSError when there is no room."""
    made: list[Path] = []
    try:
        for path in paths:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            made.append(path)
            try:
                reserve(descriptor, num_bytes)
            finally:
                os.close(descriptor)
    except OSError:
        for path in made:
            path.unlink()
        raise
