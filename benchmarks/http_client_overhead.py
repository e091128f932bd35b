"""Which HTTP client adds least to arrival stamps and burns least CPU: aiohttp or httpx, against the golden server.

python benchmarks/http_client_overhead.py   (needs httpx, which the package itself does not)
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request

import aiohttp
import httpx
import numpy as np

NUM_STREAMS, NUM_TOKENS, SPREAD = 500, 40, 2.0
BODY = {"model": "golden", "max_tokens": NUM_TOKENS, "stream": True}


async def with_aiohttp(url: str, stamps: dict[str, list[float]]) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(name: str) -> None:
            body = json.dumps(BODY | {"prompt": name}).encode()
            async with session.post(url, data=body, headers={"x-request-id": name}) as response:
                while await response.content.readany():
                    stamps[name].append(time.monotonic())

        await spread(one, stamps)


async def with_httpx(url: str, stamps: dict[str, list[float]]) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as session:

        async def one(name: str) -> None:
            body = json.dumps(BODY | {"prompt": name}).encode()
            async with session.stream("POST", url, content=body, headers={"x-request-id": name}) as response:
                async for _ in response.aiter_raw():
                    stamps[name].append(time.monotonic())

        await spread(one, stamps)


async def spread(one, stamps) -> None:  # type: ignore[no-untyped-def]
    async def later(name: str, delay: float) -> None:
        await asyncio.sleep(delay)
        await one(name)

    await asyncio.gather(*(later(name, SPREAD * i / len(stamps)) for i, name in enumerate(stamps)))


def main() -> None:
    behaviour = json.dumps({"ttft": 0.3, "rate": 4})
    for name, run in (
        ("aiohttp", with_aiohttp),
        ("httpx", with_httpx),
        ("aiohttp", with_aiohttp),
        ("httpx", with_httpx),
    ):
        command = [sys.executable, "-m", "tabstop.bench.golden", "--behaviour", behaviour]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        stamps: dict[str, list[float]] = {f"{name}-{i}": [] for i in range(NUM_STREAMS)}
        began = time.process_time()
        asyncio.run(run(url + "/v1/completions", stamps))
        cpu = time.process_time() - began
        log = {t["request"]: t["sent"] for t in json.load(urllib.request.urlopen(url + "/golden/log"))}
        server.kill()
        lates = [
            got - sent[0]
            for request, sends in log.items()
            for got, sent in zip(stamps[request], sends, strict=False)
            if len(stamps[request]) >= len(sends)
        ]
        p50, p99 = np.percentile(lates, [50, 99]) * 1e3
        per_event = cpu / (NUM_STREAMS * NUM_TOKENS) * 1e6
        print(
            f"{name:8} cpu {per_event:6.1f} us an event, stamp late: p50 {p50:.3f} ms, p99 {p99:.3f} ms ({len(lates)})"
        )


if __name__ == "__main__":
    main()
