"""`tabstop serve` as a user starts it, over a tiny random model; its processes, its metrics, and what is left of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.text.fim_vocabularies import QWEN, byte_level_definition
from tests.tiny import MERGES, tiny_llama

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds; only a hang reaches it
CONTEXT = 2048  # tokens: a stream of seconds
MEBIBYTE = 1 << 20
MEMORY_SLACK = 20 * MEBIBYTE
HELD = ("used", "waste", "reserved")  # slots of the KV pool that requests hold


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Waits for a true answer."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


def write_model(folder: Path) -> Path:
    """A model that costs nothing, knows holes, and talks until it is stopped."""
    num_tokens = 256 + len(MERGES) + len(QWEN)
    written = tiny_llama(folder, max_position_embeddings=CONTEXT, vocab_size=num_tokens)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_definition(QWEN)), encoding="utf-8")
    return written


def runs_module(process: psutil.Process, name: str) -> bool:
    """Whether it runs `python -m` a module whose name starts so; one that has not begun its program runs none."""
    return "".join(process.cmdline()[2:3]).startswith(name)


class Server:
    """A running server in a scratch folder of its own, where everything that it leaves can be seen."""

    def __init__(self, model: Path, *options: str, log: Any = None) -> None:
        """`log`: where standard output and error go instead of a file that `text` reads."""
        self.scratch = tempfile.mkdtemp(dir="/tmp", prefix="t")  # short, because a socket lies in it
        self._log = Path(tempfile.mkstemp(prefix="tabstop-log-")[1])
        self.port = _free_port()
        command = [sys.executable, "-m", "tabstop", "serve", str(model), "--offline", "--port", str(self.port)]
        command += ["--num-threads", "1", "--num-kv-blocks", "1024", "--max-num-seqs", "32", *options]
        environment = os.environ | {
            "TMPDIR": self.scratch,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        self._shared = _shared_memory()
        with self._log.open("wb") as file:
            output = file if log is None else log
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self._family: dict[int, psutil.Process] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def text(self) -> str:
        """What it has logged, but for the line that each request leaves."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if ": answered request_id=" not in line)

    # ---- processes

    def children(self, module: str = "tabstop.") -> list[psutil.Process]:
        """Children that run a module whose name starts so, oldest first."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    self._family[child.pid] = child
                    if runs_module(child, module):
                        found.append(child)
        return sorted(found, key=lambda child: (child.create_time(), child.pid))

    @property
    def engine(self) -> psutil.Process:
        return self.children("tabstop.engine")[0]

    @property
    def front_ends(self) -> list[psutil.Process]:
        return self.children("tabstop.front_end")

    def resident(self) -> dict[str, int]:
        """Bytes of memory of the supervisor, the engine, and all front ends together."""
        supervisor = psutil.Process(self.process.pid).memory_info().rss
        front_ends = sum(child.memory_info().rss for child in self.front_ends)
        return {"supervisor": supervisor, "engine": self.engine.memory_info().rss, "front ends": front_ends}

    def num_descriptors(self) -> int:
        """Open files and sockets of all its processes."""
        return sum(child.num_fds() for child in [psutil.Process(self.process.pid), *self.children()])

    # ---- what it says of itself

    def status(self, path: str = "/readyz") -> int:
        """Of a GET; 0 when nobody answers."""
        return self._get(path)[0]

    def _get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def wait_ready(self) -> Server:
        def is_ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.text}"
            return self.status() == 200

        until(is_ready, "readiness")
        self.children()
        return self

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels; nothing when nobody answers."""
        lines = self._get("/metrics")[1].splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def total(self, name: str) -> float:
        """A metric over all of its labels."""
        return sum(value for key, value in self.metrics().items() if key.split("{")[0] == name)

    def open_parts(self) -> dict[str, float]:
        """What requests hold now: slots of the KV pool, places in the engine, texts in front ends. Empty: nothing."""
        found = {}
        for key, value in self.metrics().items():
            name, _, labels = key.partition("{")
            is_slot = name == "tabstop_kv_cache_slots" and any(f'state="{part}"' in labels for part in HELD)
            is_place = name in ("tabstop_num_requests_running", "tabstop_num_requests_waiting", "tabstop_text_states")
            if value and (is_slot or is_place):
                found[key] = value
        return found

    def assert_idle(self) -> None:
        """Within a moment, nothing of any request may be left."""
        last: list[dict[str, float]] = []

        def is_idle() -> bool:
            last[:] = [self.open_parts()]
            return not last[0] and bool(self.metrics())

        try:
            until(is_idle, "an idle server", 20)
        except AssertionError:
            raise AssertionError(f"requests have left something behind: {last[0]}") from None

    # ---- the end

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, patience: float = PATIENCE) -> int:
        """Its exit code."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end:\n{self.text}") from None

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def assert_nothing_left(self) -> None:
        """No process, no file, no socket, no shared memory."""
        until(lambda: not self._alive(), f"the end of its processes {sorted(self._family)}", 20)
        assert os.listdir(self.scratch) == [], "files are left in the run folder"
        assert _shared_memory() <= self._shared, "shared memory is left"
        assert self.status() == 0, "the port still answers"

    def _alive(self) -> list[psutil.Process]:
        """A zombie is none: nobody but the system's init can take those away."""
        alive = []
        for child in self._family.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
                    alive.append(child)
        return alive

    def close(self) -> None:
        """Ends whatever is left; for the end of a test, whatever its outcome."""
        self.children()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for child in self._alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._log.unlink(missing_ok=True)


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    """A server that is ready, and gone afterwards. Its log is shown when something fails."""
    server = Server(model, *options)
    try:
        yield server.wait_ready()
    except BaseException:
        print(server.text[-20_000:])
        raise
    finally:
        server.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _shared_memory() -> set[str]:
    """Of Python, POSIX or torch, by name. Other programs' may come and go: only ours count."""
    try:
        names = os.listdir("/dev/shm")
    except FileNotFoundError:
        return set()
    return {name for name in names if re.match(r"(psm_|torch_|sem\.mp-|tabstop)", name)}
