"""Ten times more requests than a server can take: how soon the others are refused, and what the accepted ones lose.

    python benchmarks/overload.py [--model MODEL] [--blocks 6] [--seconds 20] [--factor 10] [--serve='--num-threads 1']

Starts `tabstop serve`. A closed loop of as many clients as there are slots, which come back after Retry-After when they
are refused, keeps it at capacity. Blocks without and with a flood of further requests (Poisson arrivals at --factor
times the rate of the first block) take turns, and ratios are taken pair by pair: tokens a second of all accepted
requests, of one accepted stream from its first token to its last, and of a second that the engine had a core (which is
what a busy machine leaves of the first). A refusal's time ends with its status. Prints rows for RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

NUM_SLOTS, NUM_WAITING = 8, 8


@dataclass
class Block:
    """What clients saw in one stretch of time. Times in seconds."""

    num_tokens: int = 0  # of all accepted streams, whoever sent them, within the block
    rates: list[float] = field(default_factory=list)  # tokens a second of each whole accepted stream
    refusals: list[float] = field(default_factory=list)
    num_sent: int = 0
    num_whole: int = 0
    engine_seconds: float = 0.0  # of a core
    front_end_seconds: float = 0.0
    others: list[int] = field(default_factory=list)  # statuses that nobody expected
    without_retry_after: int = 0


@dataclass
class Load:
    """Sends requests to one server; `block` is where their outcomes go now."""

    session: aiohttp.ClientSession
    url: str
    num_tokens: int
    children: dict[str, psutil.Process]
    block: Block = field(default_factory=Block)
    counter: int = 0

    async def request(self) -> float:
        """Seconds after which to come back: none when it was accepted."""
        block, self.counter = self.block, self.counter + 1
        block.num_sent += 1
        body = {"prompt": f"# file {self.counter}\ndef work(", "max_tokens": self.num_tokens, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        start = time.perf_counter()
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                block.refusals.append(time.perf_counter() - start)
                block.without_retry_after += "retry-after" not in response.headers
                if response.status != 429:
                    block.others.append(response.status)
                return float(response.headers.get("retry-after", 0))
            times = [
                time.perf_counter()
                async for line in response.content
                if line.startswith(b"data: {") and self._count(block)
            ]
        block.rates.append((len(times) - 1) / (times[-1] - times[0]))
        block.num_whole += 1
        return 0.0

    def _count(self, block: Block) -> bool:
        if self.block is block:
            block.num_tokens += 1
        return True

    def core_seconds(self, name: str) -> float:
        times = self.children[name].cpu_times()
        return float(times.user + times.system)

    async def idle(self) -> None:
        """Waits until nothing of a block is left in the engine."""
        busy = True
        while busy:
            await asyncio.sleep(0.5)
            async with self.session.get(f"{self.url}/metrics") as response:
                page = await response.text()
            busy = any(float(value) for value in re.findall(r"^tabstop_num_requests_\w+{.*} (.*)$", page, re.MULTILINE))

    async def closed_loop(self, num_clients: int) -> None:
        async def client() -> None:
            while True:
                await asyncio.sleep(await self.request())

        await asyncio.gather(*(client() for _ in range(num_clients)))

    async def flood(self, rate: float) -> None:
        generator = random.Random(0)
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(generator.expovariate(rate))
                group.create_task(self.request())


async def during(load: Load, seconds: float, rate: float) -> Block:
    """One block; what was accepted in it is cut at its end."""
    block = load.block = Block()
    tasks = [asyncio.create_task(load.closed_loop(NUM_SLOTS))]
    if rate:
        tasks.append(asyncio.create_task(load.flood(rate)))
    engine, front_end = load.core_seconds("engine"), load.core_seconds("front_end")
    await asyncio.sleep(seconds)
    block.engine_seconds = load.core_seconds("engine") - engine
    block.front_end_seconds = load.core_seconds("front_end") - front_end
    load.block = Block()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await load.idle()
    return block


async def measure(url: str, server: int, options: argparse.Namespace) -> None:
    children = {
        name: child
        for child in psutil.Process(server).children()
        for name in ("engine", "front_end")
        if f"tabstop.{name}" in " ".join(child.cmdline())
    }
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(session, url, options.tokens, children)
        first = await during(load, options.seconds, 0)
        rate = options.factor * first.num_tokens / options.tokens / options.seconds
        pairs: list[tuple[Block, Block]] = []
        for number in range(options.blocks):
            order = (0, rate) if number % 2 else (rate, 0)
            taken = {bool(one): await during(load, options.seconds, one) for one in order}
            pairs.append((taken[False], taken[True]))
    report(pairs, rate, options)


def report(pairs: list[tuple[Block, Block]], rate: float, options: argparse.Namespace) -> None:
    calm, flooded = ([pair[side] for pair in pairs] for side in (0, 1))
    refusals = sorted(1000 * seconds for block in flooded for seconds in block.refusals)
    num_sent = sum(block.num_sent for block in flooded)
    others = [status for block in (*calm, *flooded) for status in block.others]
    assert not others and not any(block.without_retry_after for block in flooded), (others, "unexpected answers")
    assert not any(block.refusals for block in calm), "the server was overloaded without the flood"
    print(f"flood: {rate:.1f} requests/s beside {NUM_SLOTS} clients, {options.blocks} pairs of {options.seconds:g} s; "
          f"{num_sent} sent, {len(refusals)} refused with 429 and Retry-After")  # fmt: skip
    print("| | at capacity | ten times over | ratio: median (each pair) |\n|---|---|---|---|")
    for name, of in (
        ("tokens/s, all accepted", lambda block: block.num_tokens / options.seconds),
        ("tokens/s of one stream, median", lambda block: statistics.median(block.rates or [math.nan])),
        ("tokens a core second of the engine", lambda block: block.num_tokens / max(0.01, block.engine_seconds)),
        ("cores that the front end took", lambda block: block.front_end_seconds / options.seconds),
    ):
        ratios = [of(over) / of(under) if of(under) else math.nan for under, over in pairs]
        sides = [statistics.median(map(of, side)) for side in (calm, flooded)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {sides[0]:.3g} | {sides[1]:.3g} | {statistics.median(ratios):.3f} ({each}) |")
    at = {share: refusals[min(len(refusals) - 1, int(share * len(refusals)))] for share in (0.5, 0.9, 0.99)}
    print(
        f"| refusal, ms: p50, p90, p99, most | | {at[0.5]:.1f}, {at[0.9]:.1f}, {at[0.99]:.1f}, {refusals[-1]:.1f} | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--factor", type=float, default=10)
    parser.add_argument("--serve", default="--num-threads 1", help="further options of the server")
    options = parser.parse_args()
    command = [sys.executable, "-m", "tabstop", "serve", options.model, "--port", "0", *shlex.split(options.serve)]
    command += ["--max-num-seqs", str(NUM_SLOTS), "--max-num-waiting", str(NUM_WAITING), "--max-model-len", "1024"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "160"}) as server:
        try:
            asyncio.run(measure(url_of(server), server.pid, options))
        finally:
            server.terminate()
            server.wait()


def url_of(server: subprocess.Popen[Any]) -> str:
    """Where it serves, once it is ready."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop the server
            return found[0]
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
