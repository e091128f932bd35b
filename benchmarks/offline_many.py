"""`LLM.generate` over many prompts: is the batch full, is memory flat? A tiny random model: what is around it shows.

PYTHONPATH=. python benchmarks/offline_many.py --prompts 10000
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tabstop import LLM, SamplingParams
from tests.tiny import tiny_llama

MIB = 1 << 20


class Watch(threading.Thread):
    """Notes how many prompts have ended, and the resident memory then, ten times a second."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(daemon=True)
        self._llm, self._process, self._over = llm, psutil.Process(), threading.Event()
        self.seen: list[tuple[int, int, int]] = []  # (ended, bytes, waiting)

    def run(self) -> None:
        while not self._over.wait(0.1):
            stats = self._llm._client.stats
            self.seen.append((sum(stats.finished.values()), self._process.memory_info().rss, stats.num_waiting))

    def end(self) -> None:
        self._over.set()
        self.join()

    def at(self, share: float, num_prompts: int) -> int:
        """Bytes when that share of the prompts had ended."""
        return next((rss for ended, rss, _ in self.seen if ended >= share * num_prompts), self.seen[-1][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--seqs", type=int, default=64)
    arguments = parser.parse_args()
    chooser = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(str(tiny_llama(Path(folder))), max_num_seqs=arguments.seqs, max_model_len=256, num_threads=1)
        prompts = [f"def f{n}(x):\n    " + "y = x + 1\n" * chooser.randint(0, 4) for n in range(arguments.prompts)]
        params = [
            SamplingParams(max_tokens=chooser.randint(4, 28), ignore_eos=True, seed=n) for n in range(len(prompts))
        ]
        llm.generate(prompts[:200], params[:200], use_tqdm=False)
        before, start, watch = llm._client.stats, time.perf_counter(), Watch(llm)
        watch.start()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        watch.end()
        seconds, after = time.perf_counter() - start, llm._client.stats
        num_steps, num_tokens = (
            getattr(after, name) - getattr(before, name) for name in ("num_steps", "num_generation_tokens")
        )
        assert num_tokens == sum(len(output.outputs[0].token_ids) for output in outputs)
        shares = [watch.at(share, len(prompts) + 200) / MIB for share in (0.1, 0.5, 0.9, 1)]
        waiting = [waiting for ended, _, waiting in watch.seen if ended < 0.9 * len(prompts)]
        print(f"{len(prompts)} prompts, {num_tokens} tokens, {num_steps} steps, {seconds:.1f} s")
        rows = num_tokens / num_steps
        print(f"rows a step: {rows:.1f} of {arguments.seqs}: {rows / arguments.seqs:.1%}")
        print(f"waiting, until nine tenths had ended: {min(waiting)} to {max(waiting)}")
        print("resident MiB when 10, 50, 90, 100 % had ended: " + ", ".join(f"{each:.0f}" for each in shares))
        llm.close()


if __name__ == "__main__":
    main()
