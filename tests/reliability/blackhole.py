"""Clients that vanish: no FIN, no RST, packets go nowhere. `python -m tests.reliability.blackhole --streams 24`.

A network of its own (a Linux namespace) in which the clients' address is taken away while they wait. Connections from
another address go on. Exits with NOT_PERMITTED where such a network cannot be had.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import socket
import struct
import sys
import tempfile
from pathlib import Path

import psutil

from tests.reliability.crowd import Crowd
from tests.reliability.requests import Ask, long_stream
from tests.reliability.server import Server, serving, until, write_model

NOT_PERMITTED = 77
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8913, 0x8914, 0x8916, 1
LOOPBACK, SECOND_NAME, SECOND_ADDRESS = b"lo", b"lo:1", "10.9.8.7"

SEND_TIMEOUT = 2  # seconds
ROOM = ("--max-num-seqs", "256", "--num-kv-blocks", "16384")  # all of them run at once, others beside them
OPTIONS = ("--send-timeout", str(SEND_TIMEOUT), "--num-front-ends", "2", *ROOM)
MIN_NEIGHBOURS = 20  # answers to others, before and after


def enter_network() -> None:
    """Makes this process, which has one thread, the owner of a network of its own. Raises OSError."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "unshare"):
        raise OSError("this system has no namespaces")
    if library.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    set_up(LOOPBACK, True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        address = socket.inet_aton(SECOND_ADDRESS)
        fcntl.ioctl(control, SIOCSIFADDR, struct.pack("16sHH4s8x", SECOND_NAME, socket.AF_INET, 0, address))


def set_up(name: bytes, is_up: bool) -> None:
    """Switches an interface on or off; a second name of one loses its address when it is off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH14x", name, 0)))[1]
        wanted = flags | IFF_UP if is_up else flags & ~IFF_UP
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", name, wanted))


def ask(port: int, data: bytes, *, reads: bool) -> socket.socket:
    """A client at the address that will be gone; it has sent something, and read the first of an answer."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60, source_address=(SECOND_ADDRESS, 0))
    connection.sendall(data)
    if reads:
        assert connection.recv(1 << 12).startswith(b"HTTP/1.1 200"), "no answer"
    return connection


def several(ask: Ask) -> Ask:
    """Long enough to be there when its client is missed."""
    return Ask(ask.path, {**ask.body, "n": 4, "max_tokens": 1900}, 4)


def vanishing(port: int, num_streams: int) -> list[socket.socket]:
    """In every state in which a client can be: streaming, waiting for a whole answer, idle, in a head, in a body."""
    stream = several(long_stream()).to_bytes()
    waiting = several(Ask("/v1/completions", {**long_stream().body, "stream": False})).to_bytes()
    short = Ask("/v1/completions", {"prompt": "x", "max_tokens": 1}).to_bytes(keep_alive=True)
    found = [ask(port, short, reads=True) for _ in range(num_streams // 4)]
    found += [ask(port, waiting[:cut], reads=False) for cut in (40, len(waiting) - 10)]
    found += [ask(port, waiting, reads=False) for _ in range(num_streams // 4)]
    return found + [ask(port, stream, reads=True) for _ in range(num_streams)]


def held(server: Server) -> int:
    """Connections to the address that is gone."""
    connections = [one for child in server.front_ends for one in child.net_connections("tcp")]
    return sum(bool(one.raddr) and one.raddr.ip == SECOND_ADDRESS for one in connections)


def vanish(server: Server, num_streams: int) -> str:
    """Clients vanish beside others who stay; afterwards nothing of them may be left. What was seen."""
    with Crowd(server.port, 4) as crowd:  # what is made once is there then
        crowd.wait_for(MIN_NEIGHBOURS)
    server.assert_idle()
    descriptors, aborts = server.num_descriptors(), server.total("tabstop_aborts_total")
    num_open = num_streams + num_streams // 4
    with Crowd(server.port, 2, pause=0.1) as crowd:
        crowd.wait_for(MIN_NEIGHBOURS)
        clients = vanishing(server.port, num_streams)
        until(lambda: held(server) == len(clients), "all connections")
        assert server.total("tabstop_num_requests_running") >= num_open, "the streams have ended already"
        set_up(SECOND_NAME, False)
        until(lambda: not held(server), "the end of connections to nowhere", 20 * SEND_TIMEOUT)
        crowd.wait_for(len(crowd.tally.ends) + MIN_NEIGHBOURS)
    crowd.tally.assert_each_ended_once()
    assert set(crowd.tally.kinds) == {"finished"}, crowd.tally.kinds
    server.assert_idle()
    num_aborted = server.total("tabstop_aborts_total") - aborts
    assert num_aborted >= num_open, f"only {num_aborted} of {num_open} were ended: the others were computed for nobody"
    until(lambda: server.num_descriptors() <= descriptors + 2, "closed descriptors")
    for client in clients:
        client.close()
    return (
        f"{len(clients)} clients vanished, {num_aborted:.0f} samples ended; others meanwhile: {dict(crowd.tally.kinds)}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--streams", type=int, default=24)
    given = options.parse_args()
    try:
        enter_network()
    except OSError as error:
        print(f"a network of its own is not permitted here: {error}")
        sys.exit(NOT_PERMITTED)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(write_model(Path(folder) / "tiny"), *OPTIONS) as server,
    ):
        print(vanish(server, given.streams))
        assert psutil.pid_exists(server.process.pid) and "Traceback" not in server.text, server.text
        assert server.stop() == 0
        server.assert_nothing_left()


if __name__ == "__main__":
    main()
