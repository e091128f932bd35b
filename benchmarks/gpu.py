"""Our engine on one GPU with random weights: offline throughput and latency at small batches, on the peers' workload.

    PYTHONPATH=. python benchmarks/gpu.py FOLDER [--requests N] [--loads N] [--batches 1,8,32] [--option NAME=VALUE]
                                        [--sampling NAME=VALUE]

FOLDER holds config.json (and a tokenizer), no weights. Half of the prompts have 128 tokens, half 512; 256 new tokens
each, greedy unless --sampling says otherwise, no end token; ids are random and never repeated between loads. Prints
one JSON line a measurement.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_workload import NUM_NEW, arguments_of, model_name, prompt_lengths
from tabstop.config import EngineConfig
from tabstop.engine import garbage
from tabstop.engine.build import build_core
from tabstop.engine.core import EngineCore
from tabstop.types import Limits, Sampling, Submit, pack_ids


class Load:
    """Runs batches of requests through a core to the end and times them."""

    def __init__(self, core: EngineCore, sampling: Sampling, seed: int = 0) -> None:
        self.core = core
        self.sampling = sampling
        self.random = np.random.default_rng(seed)
        self.counter = 0

    def run(self, lengths: list[int], num_new: int) -> dict[str, Any]:
        """Seconds until the first token of all, and until all is done; output tokens; quantiles of steps."""
        for length in lengths:
            ids = self.random.integers(300, 15_000, length)
            limits = Limits(num_new, stop_sets=())
            self.core.add(Submit((0, self.counter), pack_ids(ids), self.sampling, limits), 0.0)
            self.counter += 1
        start, pending, num_tokens, first = time.perf_counter(), None, 0, {}
        steps = []
        while self.core.has_work() or pending:
            step_start = time.perf_counter()
            pending, deltas = self.core.step(pending, 0.0)
            steps.append(1000 * (time.perf_counter() - step_start))
            for delta in deltas:
                assert delta.failure is None, delta.failure
                num_tokens += len(delta.token_ids)
                first.setdefault(delta.request_id, time.perf_counter() - start)
        seconds = time.perf_counter() - start
        assert num_tokens == len(lengths) * num_new
        quantiles = [round(float(value), 2) for value in np.quantile(steps, [0.05, 0.5, 0.95, 1.0])]
        return {"seconds": seconds, "first": max(first.values()), "tokens": num_tokens, "step_ms": quantiles}


def throughput(core: EngineCore, sampling: Sampling, num_requests: int, seed: int) -> dict[str, Any]:
    load = Load(core, sampling, 1000 + seed)
    load.run([128] * 4, 8)
    before = core.stats()
    run = load.run(prompt_lengths(num_requests), NUM_NEW)
    after = core.stats()
    return {
        "requests": num_requests,
        "seconds": round(run["seconds"], 2),
        "output_tokens_per_second": round(run["tokens"] / run["seconds"], 1),
        "steps": after.num_steps - before.num_steps,
        "ms_per_step": round(1000 * run["seconds"] / (after.num_steps - before.num_steps), 2),
        "step_ms_p5_p50_p95_max": run["step_ms"],
        "preemptions": after.num_preemptions - before.num_preemptions,
    }


def latency(core: EngineCore, sampling: Sampling, batch: int, repeats: int = 5) -> dict[str, Any]:
    """Time to the first token, and time per token after it, medians."""
    load = Load(core, sampling, seed=batch)
    load.run([128] * batch, 8)
    runs = [load.run([128] * batch, NUM_NEW) for _ in range(repeats)]
    return {
        "batch": batch,
        "ttft_ms": round(1000 * statistics.median(run["first"] for run in runs), 2),
        "tpot_ms": round(1000 * statistics.median((run["seconds"] - run["first"]) / (NUM_NEW - 1) for run in runs), 3),
    }


DEFAULTS = {"max_model_len": 4096, "max_num_waiting": 100_000}
"""The engine's options of these measurements."""


def main() -> None:
    arguments = arguments_of(__doc__, batches="1,8,32")
    options = DEFAULTS | arguments.option
    sampling = Sampling(**arguments.sampling)
    start = time.perf_counter()
    core = build_core(EngineConfig(model=arguments.folder, load_format="dummy", device="cuda", **options))
    garbage.settle()  # as the engine process does
    common = {
        "model": model_name(arguments.folder),
        "device": torch.cuda.get_device_name(),
        **options,
        **arguments.sampling,
    }
    print(json.dumps(common | {"ready_s": round(time.perf_counter() - start, 1), "blocks": core.info.num_blocks}))
    for batch in arguments.batches:
        print(json.dumps(common | latency(core, sampling, batch)), flush=True)
    for seed in range(arguments.loads if arguments.requests else 0):
        print(json.dumps(common | throughput(core, sampling, arguments.requests, seed)), flush=True)
    free, total = torch.cuda.mem_get_info()
    gib = {part: round(size / 2**30, 2) for part, size in core.info.memory.items()}
    print(json.dumps(common | {"memory_gib_when_ready": gib, "used_at_the_end": round((total - free) / 2**30, 2)}))
    core.close()


if __name__ == "__main__":
    main()
