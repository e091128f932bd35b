"""Runs one program that nobody trusts, with nothing but the standard library. A script for sandbox.py, never imported.

`python -I -S child.py PROGRAM`; stdin: a secret word and the limits, as one line of JSON. The word goes to stdout when
the program has run to its end, else the class of the exception. What the program prints goes nowhere.
"""

import contextlib
import ctypes
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
)
"""Audit events that no test of a function needs. They stop accidents; whoever fears malice needs a container, too."""

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Writing files is refused, too."""
    is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if is_write or event.startswith(REFUSED):
        raise PermissionError(event)


def restrict(limits: dict[str, int]) -> None:
    """Limits that a process keeps to its end, and no network where the kernel lets users have a namespace."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, name), (most, most))
    signal.alarm(limits["RLIMIT_CPU"] + 5)  # where nobody waits for us any more
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
