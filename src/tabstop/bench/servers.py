"""Endpoints as the user names them: a URL, or a command that starts a server. Starts, waits, stops.

Knows processes and readiness, nothing of what is measured. A command holds {port} where the port goes; a server that
prints its URL as its first line (as the golden one does) needs none.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from tabstop.errors import InputError

READY_PATHS = ("/readyz", "/health", "/v1/models", "/info", "/")
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy of the environment, as the measured requests go: a proxy cannot reach a server of this machine."""
URL_LINE = re.compile(rb"^(https?://[^\s]+)\s*$", re.MULTILINE)


class Server:
    """One endpoint. With a command, it runs between start() and stop(); without, it is somebody else's."""

    def __init__(self, url: str | None = None, command: str | None = None, start_timeout: float = 600.0) -> None:
        assert (url is None) != (command is None)
        self.given_url = url
        self.command = command
        self.start_timeout = start_timeout
        self.log: Path | None = None
        self._folder: TemporaryDirectory[str] | None = None  # of the log, as long as the server runs
        self._process: subprocess.Popen[bytes] | None = None
        self._url = url

    @property
    def name(self) -> str:
        return self.given_url or self.command or ""

    @property
    def url(self) -> str:
        assert self._url is not None, "the server was not started"
        return self._url

    @property
    def is_running(self) -> bool:
        return self.command is None or (self._process is not None and self._process.poll() is None)

    def start(self) -> str:
        """The URL, once it answers. Raises InputError if it does not start or not answer in time."""
        if self.command is None or self.is_running:
            return self.url
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        words = [word.replace("{port}", str(port)) for word in command_words(self.command)]
        self._folder = TemporaryDirectory(prefix="tabstop-bench-")
        self.log = Path(self._folder.name) / "server.log"
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
                )
        except OSError as error:
            self.stop()
            raise InputError(f"cannot start {words[0]!r}: {error.strerror}") from None
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self.url

    def _wait(self) -> None:
        assert self._process is not None and self.log is not None
        has_port = self.command is not None and "{port}" in self.command
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise InputError(
                    f"the server ended with code {code} before it answered; its last words:\n{self.tail()}"
                )
            if not has_port and (found := URL_LINE.search(self.log.read_bytes())):
                self._url = found.group(1).decode()
                has_port = True
            if has_port and answers(self.url):
                return
            time.sleep(0.1)
        raise InputError(f"the server did not answer within {self.start_timeout:g} s; its last words:\n{self.tail()}")

    def tail(self, num_lines: int = 20) -> str:
        """The last lines that the server wrote, while it runs or until stop() after it has died."""
        if self.log is None:
            return ""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """Ends the server and all that it started, and deletes its log."""
        process, folder = self._process, self._folder
        self._process = self._folder = self.log = None
        try:
            if process is not None:
                self._end(process)
        finally:
            if folder is not None:
                folder.cleanup()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Politely, then by force: also what outlives its parent, and whatever an impatient Ctrl-C cuts short."""
        try:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10.0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Fleet:
    """The servers of a comparison: all together, or only the one that is being measured."""

    def __init__(self, servers: list[Server], *, one_at_a_time: bool = False) -> None:
        self.servers = servers
        self.one_at_a_time = one_at_a_time

    def __enter__(self) -> Fleet:
        try:
            if not self.one_at_a_time:
                for server in self.servers:
                    server.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # one that fails to stop keeps no other one running
            for server in self.servers:
                stack.callback(server.stop)

    def use(self, number: int) -> tuple[str, bool]:
        """The URL of a server that runs now, and whether it was started just for this."""
        server = self.servers[number]
        was_running = server.is_running
        if not was_running and self.one_at_a_time:
            for other in self.servers:
                other.stop()
        if not was_running and not self.one_at_a_time:
            raise InputError(self.death(number))
        return server.start(), not was_running

    def death(self, number: int) -> str:
        """What to say of a server that ended by itself."""
        server = self.servers[number]
        return f"the server {server.name!r} ended during the run; its last words:\n{server.tail()}"


def command_words(command: str) -> list[str]:
    """Raises InputError for a command without a word, or with a quote that does not end."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"cannot read --start {command!r}: {error}") from None
    if not words:
        raise InputError("--start is empty: give a command that starts a server")
    return words


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """True if any usual path answers and none says "not ready"."""
    for path in READY_PATHS:
        try:
            with DIRECT.open(url.rstrip("/").removesuffix("/v1") + path, timeout=5) as response:
                return bool(response.status < 400)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 503:
                return False
        except (urllib.error.URLError, OSError, http.client.HTTPException):
            return False
    return False
