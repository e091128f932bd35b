"""Processes that are killed or frozen under load: `python -m tests.reliability.kills --times 60`.

An engine that dies ends every stream with an error and the server with exit code 70 (a process manager starts it again:
here, this program). A frozen one is found by its missing heartbeat and killed. A front end that dies or freezes takes
its own connections with it and no others, and is started again. A whole server that stood still goes on as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.reliability.crowd import Crowd, Tally, leaving, never_accepted
from tests.reliability.server import MEMORY_SLACK, Server, serving, until, write_model

NUM_CLIENTS = 8
PAUSE = 0.05  # seconds of a client between two requests
ENGINE_TIMEOUT = 10.0  # seconds: what is frozen is found within it; less, and one that only starves is taken for it
TIMEOUT = ("--engine-timeout", str(ENGINE_TIMEOUT))
EXIT_FAILED = 70
DEAD = {"engine_dead", "503", "internal_error", "unavailable"}
"""Codes by which a client may learn of it."""


def kill_engine(model: Path, seed: int, number: signal.Signals) -> tuple[Tally, float]:
    """One life of a server whose engine gets a signal under load; what its clients saw, and seconds to its exit."""
    generator = random.Random(seed)
    with serving(model, *TIMEOUT, "--num-front-ends", "2") as server:
        with Crowd(server.port, NUM_CLIENTS, leaving, seed, pause=PAUSE) as crowd:
            crowd.wait_for(NUM_CLIENTS)
            time.sleep(generator.uniform(0, 0.5))
            victim, start = server.engine, time.monotonic()
            victim.send_signal(number)
            code = server.wait()
            seconds = time.monotonic() - start
        assert code == EXIT_FAILED, f"exit code {code}\n{server.text}"
        crowd.tally.assert_each_ended_once(never_accepted(start))
        assert set(crowd.tally.errors) <= DEAD, crowd.tally.errors
        server.assert_nothing_left()
    return crowd.tally, seconds


def kill_front_ends(server: Server, numbers: Sequence[signal.Signals], seed: int) -> Tally:
    """Signals to front ends of a server under load, one after another; it has TIMEOUT.

    Only what a victim had accepted may be cut.
    """
    victims_ports: set[int] = set()
    with Crowd(server.port, NUM_CLIENTS, leaving, seed, pause=PAUSE) as crowd:
        for number in numbers:
            crowd.wait_for(len(crowd.tally.ends) + NUM_CLIENTS)
            until(lambda: sum(bool(ports_of(child)) for child in server.front_ends) == 2, "two front ends that serve")
            time.sleep(0.5)  # one that dies before it was ready is a start that failed; three of those end the server
            victim = server.front_ends[0]
            victim.suspend()  # it accepts nothing while we look
            victims_ports |= ports_of(victim)
            victim.send_signal(number)
            until(lambda pid=victim.pid: pid not in [child.pid for child in server.front_ends], "its end")
        until(lambda: server.status() == 200 and len(server.front_ends) == 2, "a new front end")
    crowd.tally.assert_each_ended_once(lambda end: end.port in victims_ports)
    server.assert_idle()
    assert server.process.poll() is None
    return crowd.tally


def stand_still(server: Server, seconds: float) -> None:
    """All of it at once, as on a machine that was asleep: nobody is taken for dead, and what was open ends well."""
    supervisor = psutil.Process(server.process.pid)
    family = [supervisor, *server.children()]
    with Crowd(server.port, NUM_CLIENTS, pause=PAUSE) as crowd:
        crowd.wait_for(NUM_CLIENTS)
        for process in family:
            process.suspend()
        time.sleep(seconds)
        for process in family:  # who watches goes on first
            process.resume()
            time.sleep(0.2)
        crowd.wait_for(len(crowd.tally.ends) + NUM_CLIENTS)
    crowd.tally.assert_each_ended_once(lambda end: end.num_bytes == 0)  # a head on its way has a limit of its own
    assert {end.kind for end in crowd.tally.ends if end.status != 408} <= {"finished", "excused"}, crowd.tally.kinds
    assert [supervisor, *server.children()] == family, "a process was replaced"


def ports_of(process: psutil.Process) -> set[int]:
    """The other ends of its connections."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {connection.raddr.port for connection in process.net_connections("tcp") if connection.raddr}
    return set()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--times", type=int, default=60, help="engines; every sixth is frozen instead of killed, as front ends are"
    )
    options.add_argument("--front-ends", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "tiny")
        run_engines(model, given.times, given.seed)
        with serving(model, *TIMEOUT, "--num-front-ends", "2") as server:
            kill_front_ends(server, [signal.SIGKILL], given.seed)
            before = server.resident()
            numbers = [drawn_signal(index) for index in range(given.front_ends)]
            tally = kill_front_ends(server, numbers, given.seed + 1)
            growth = {name: value - before[name] for name, value in server.resident().items()}
            print(f"front ends lost {given.front_ends} times: {dict(tally.kinds)}; memory grew by {growth} bytes")
            stand_still(server, 2 * ENGINE_TIMEOUT)
            assert all(value < MEMORY_SLACK for value in growth.values())
            assert server.stop() == 0
            server.assert_nothing_left()


def drawn_signal(index: int) -> signal.Signals:
    return signal.SIGSTOP if index % 6 == 5 else signal.SIGKILL


def run_engines(model: Path, times: int, seed: int) -> None:
    whole, seconds = Tally(), {signal.SIGKILL: [0.0], signal.SIGSTOP: [0.0]}
    for index in range(times):
        number = drawn_signal(index)
        tally, took = kill_engine(model, seed + index, number)
        whole.ends += tally.ends
        seconds[number].append(took)
        print(f"{index + 1}: {number.name}: {dict(tally.kinds)}, exit after {took:.1f} s", flush=True)
    longest = {number.name: f"{max(values):.1f} s" for number, values in seconds.items()}
    print(f"engines lost {times} times: {dict(whole.kinds)}, errors {dict(whole.errors)}; longest way out {longest}")


if __name__ == "__main__":
    main()
