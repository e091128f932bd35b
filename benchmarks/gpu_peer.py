"""vLLM on the workload of benchmarks/gpu.py, with random weights: the same JSON lines, to be run on the same card.

    PYTHONPATH=. python benchmarks/gpu_peer.py FOLDER [--requests N] [--loads N] [--batches 1,8] [--option NAME=VALUE]
                                             [--sampling NAME=VALUE]

Runs in an environment that has vLLM; needs nothing of Tabstop. FOLDER holds config.json and a tokenizer. Prompts are
never repeated, or the peer's prefix cache would answer.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.gpu_workload import NUM_NEW, arguments_of, model_name, prompt_lengths


class Peer:
    """An engine, and fresh prompts for it."""

    def __init__(self, folder: str, options: dict[str, Any], sampling: dict[str, Any]) -> None:
        common = {"load_format": "dummy", "max_model_len": 4096, "gpu_memory_utilization": 0.92}
        self.llm = LLM(model=folder, **common | options)
        self.sampling = sampling
        self.random = random.Random(0)

    def run(self, lengths: list[int], num_new: int) -> float:
        """Seconds until all prompts of these lengths have `num_new` tokens more."""
        prompts = [{"prompt_token_ids": [self.random.randrange(300, 15_000) for _ in range(n)]} for n in lengths]
        params = SamplingParams(**self.sampling, max_tokens=num_new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == len(lengths) * num_new
        return seconds

    def throughput(self, num_requests: int) -> dict[str, Any]:
        self.run([128] * 4, 8)
        seconds = self.run(prompt_lengths(num_requests), NUM_NEW)
        tokens = num_requests * NUM_NEW
        rates = {"seconds": round(seconds, 2), "output_tokens_per_second": round(tokens / seconds, 1)}
        return {"requests": num_requests} | rates

    def latency(self, batch: int, repeats: int = 5) -> dict[str, Any]:
        """Time to the first token, and time per token after it, medians."""
        self.run([128] * batch, 8)
        first = statistics.median(self.run([128] * batch, 1) for _ in range(repeats))
        whole = statistics.median(self.run([128] * batch, NUM_NEW) for _ in range(repeats))
        times = {"ttft_ms": round(1000 * first, 2), "tpot_ms": round(1000 * (whole - first) / (NUM_NEW - 1), 3)}
        return {"batch": batch} | times


def main() -> None:
    arguments = arguments_of(__doc__, batches="1,8")
    options = arguments.option
    start = time.perf_counter()
    peer = Peer(arguments.folder, options, arguments.sampling)
    common = {"model": model_name(arguments.folder), "peer": "vLLM", **options, **arguments.sampling}
    print(json.dumps(common | {"ready_s": round(time.perf_counter() - start, 1)}), flush=True)
    for batch in arguments.batches:
        print(json.dumps(common | peer.latency(batch)), flush=True)
    for _ in range(arguments.loads if arguments.requests else 0):
        print(json.dumps(common | peer.throughput(arguments.requests)), flush=True)


if __name__ == "__main__":
    main()
