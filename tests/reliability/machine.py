"""A machine that has nothing left, or changes under a server: `python -m tests.reliability.machine`.

Descriptors run out in front ends and in the supervisor, memory in front ends, and the wall clock jumps. A server may
refuse meanwhile; it may not end, answer wrongly, or remember it afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.reliability.client import STAYS
from tests.reliability.crowd import Crowd, Tally
from tests.reliability.requests import Ask, long_stream
from tests.reliability.server import MEBIBYTE, PATIENCE, Server, serving, until, write_model

SPARE_FILES = 8
HOUR = 3600
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long offset(void) {  // seconds that stand in a file now
    char text[32] = {0};
    int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
    if (file < 0) return 0;
    if (read(file, text, 31) < 0) text[0] = 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec* now) {
    static int (*real)(clockid_t, struct timespec*);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset();
    return result;
}
time_t time(time_t* to) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (to) *to = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval* now, void* zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
"""


@contextlib.contextmanager
def limited(processes: list[psutil.Process], kind: int, most: dict[int, int]) -> Iterator[None]:
    """A limit of running processes, by pid; afterwards as before."""
    before = {process.pid: process.rlimit(kind) for process in processes}
    for process in processes:
        process.rlimit(kind, (most[process.pid], before[process.pid][1]))
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(kind, before[process.pid])


def without_files(server: Server, num_connections: int) -> int:
    """More connections than front ends may have descriptors; how many of those were answered."""
    front_ends, descriptors, num_lines = server.front_ends, server.num_descriptors(), len(server.text.splitlines())
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    ask_kept(kept)
    most = {process.pid: process.num_fds() + SPARE_FILES for process in front_ends}
    with limited(front_ends, psutil.RLIMIT_NOFILE, most), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.port)) for _ in range(num_connections)]
        ask_kept(kept)
        num_answered = sum(first_bytes(client).startswith(b"HTTP/1.1 200") for client in clients)
        ask_kept(kept)
    kept.close()
    until(lambda: server.status() == 200, "a ready server")
    server.assert_idle()
    until(lambda: server.num_descriptors() <= descriptors + 2, "closed descriptors")
    assert server.front_ends == front_ends, "a front end ended"
    assert len(server.text.splitlines()) < num_lines + 10 * num_connections, "the log was flooded"
    return num_answered


def ask_kept(connection: http.client.HTTPConnection) -> None:
    """Who is connected already is served as ever."""
    connection.request(
        "POST", "/v1/completions", '{"prompt": "x", "max_tokens": 2}', {"content-type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    response.read()


def connect(port: int) -> socket.socket:
    """A client that asks for a stream; the system takes its connection, whatever the server does."""
    client = socket.create_connection(("127.0.0.1", port), timeout=3)
    with contextlib.suppress(ConnectionError):
        client.sendall(long_stream().to_bytes())
    return client


def first_bytes(client: socket.socket) -> bytes:
    """Nothing when it was closed, or not served within its time-out."""
    try:
        return client.recv(4096)
    except OSError:
        return b""


def without_files_for_children(server: Server) -> None:
    """The supervisor has no descriptor left when a front end dies: the other one serves until there are some again."""
    supervisor, victim = psutil.Process(server.process.pid), server.front_ends[0]
    with limited([supervisor], psutil.RLIMIT_NOFILE, {supervisor.pid: 3}):
        victim.send_signal(signal.SIGKILL)
        until(lambda: server.text.count("cannot be started") > 2, "three vain starts")
        assert server.process.poll() is None and server.status() == 200
    until(lambda: len(server.front_ends) == 2 and server.status() == 200, "a new front end")


def without_memory(server: Server, num_bodies: int) -> Tally:
    """Large bodies for front ends that may not grow; one that dies of it is replaced."""
    front_ends = server.front_ends
    most = {process.pid: process.memory_info().vms + 4 * MEBIBYTE for process in front_ends}
    tally = Tally()
    with limited(front_ends, psutil.RLIMIT_AS, most):
        large = Ask("/v1/completions", {"prompt": "x" * (7 * MEBIBYTE), "max_tokens": 1})
        with Crowd(server.port, num_bodies, lambda generator: (large, STAYS)) as crowd:
            crowd.wait_for(2 * num_bodies)
        tally = crowd.tally
    until(lambda: server.status() == 200 and len(server.front_ends) == 2, "a ready server")
    with Crowd(server.port, 2) as crowd:
        crowd.wait_for(10)
    assert set(crowd.tally.kinds) == {"finished"}, crowd.tally.kinds
    server.assert_idle()
    return tally


@contextlib.contextmanager
def clock(folder: Path) -> Iterator[Path]:
    """Servers that start now read wall clocks that are off by the seconds in the file.

    Raises FileNotFoundError without a C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler here")
    source, library, offset = folder / "clock.c", folder / "clock.so", folder / "offset"
    source.write_text(CLOCK)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    before = dict(os.environ)
    os.environ |= {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}
    try:
        yield offset
    finally:
        os.environ.clear()
        os.environ |= before


def jump(server: Server, offset: Path, seconds: float) -> Tally:
    """The clock goes an hour forth, and two back, under load: nobody is hurried, nobody is held."""
    created = []
    with Crowd(server.port, 4, pause=0.02) as crowd:
        for hours in (1, -1, 0):
            crowd.wait_for(len(crowd.tally.ends) + 8)
            offset.write_text(str(hours * HOUR))
            created.append(created_of(server) - time.time())
            time.sleep(seconds)
    crowd.tally.assert_each_ended_once()
    assert set(crowd.tally.kinds) == {"finished"}, crowd.tally.kinds
    assert [round(each / HOUR) for each in created] == [1, -1, 0], "the server did not see the clock jump"
    server.assert_idle()
    return crowd.tally


def created_of(server: Server) -> int:
    """What it takes for the time."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(
        "POST", "/v1/completions", '{"prompt": "x", "max_tokens": 1}', {"content-type": "application/json"}
    )
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return int(answer["created"])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny")
        with serving(model, "--num-front-ends", "2") as server:
            print(f"400 connections for {2 * SPARE_FILES} descriptors: {without_files(server, 400)} answered")
            without_files_for_children(server)
            print(f"without memory: {dict(without_memory(server, 8).kinds)}")
            assert server.stop() == 0
            server.assert_nothing_left()
        with clock(Path(folder)) as offset, serving(model, "--num-front-ends", "2") as server:
            print(f"the clock jumps: {dict(jump(server, offset, 5).kinds)}")
            assert server.stop() == 0


if __name__ == "__main__":
    main()
