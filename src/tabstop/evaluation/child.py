"""Runs one program that nobody trusts, with nothing but the standard library. A script for programs.py, never imported.

`python -I -S child.py PROGRAM`; stdin: a secret word and the limits, as one line of JSON. The word goes to stdout when
the program has run to its end, else the class of the exception. What the program prints goes nowhere.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import runpy
import signal
import sys

REFUSED = (
    *(
        "socket.",
        "subprocess.",
        "os.fork",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.kill",
        "os.forkpty",
    ),
    *("ctypes.", "pty.", "signal.pthread_kill", "_thread.start_new_thread", "webbrowser.", "urllib.", "ftplib."),
    *("os.chmod", "os.chown", "os.link", "os.symlink", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil."),
    *("os.mkdir", "os.utime", "os.setxattr", "os.removexattr", "sqlite3.", "resource.", "signal.pidfd_send_signal"),
)
"""Audit events that no test of a function needs. They stop accidents; whoever fears malice needs a container, too."""

UNHEARD = {
    "posix": ("mkfifo", "mknod", "pidfd_open", "setpriority", "setsid"),
    "signal": ("pidfd_send_signal",),
    "_signal": ("pidfd_send_signal",),
    "_thread": ("start_new_thread", "start_joinable_thread"),
    "_posixsubprocess": ("fork_exec",),
}
"""Module → functions that raise no audit event, or not in every Python; they are taken away."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
"""Flags of open. O_RDONLY | O_TRUNC empties a file, too."""

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Writing files is refused, too, and so are files that show other processes."""
    if event == "open":
        path, _, flags = arguments
        is_refused = bool(isinstance(flags, int) and flags & WRITES) or _is_of_processes(path)
    else:
        is_refused = event.startswith(REFUSED)
    if is_refused:
        raise PermissionError(event)


def _is_of_processes(path: object) -> bool:
    """Whether it is in /proc, where the environment of who started us is shown."""
    if not isinstance(path, str | bytes):
        return False
    return os.path.realpath(os.fsdecode(path)).startswith("/proc/")


def deny(*arguments: object, **options: object) -> None:
    raise PermissionError


def take_away() -> None:
    for module, names in UNHEARD.items():
        with contextlib.suppress(ImportError):
            loaded = importlib.import_module(module)
            for name in names:
                if hasattr(loaded, name):
                    setattr(loaded, name, deny)
                    if module == "posix":
                        setattr(os, name, deny)


def restrict(limits: dict[str, int]) -> None:
    """Limits that a process keeps to its end, and no network where the kernel lets users have a namespace."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))
    signal.alarm(limits["RLIMIT_CPU"] + 5)  # where nobody waits for us any more
    take_away()
    sys.addaudithook(refuse)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    told = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    restrict(order["limits"])
    word, status = order["word"], 0
    try:
        runpy.run_path(sys.argv[1], run_name="__main__")
    except BaseException as error:
        word, status = "exit" if isinstance(error, SystemExit) else type(error).__name__, 1
    os.write(told, word.encode())
    os._exit(status)


if __name__ == "__main__":
    main()
