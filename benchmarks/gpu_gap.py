"""What a long prompt costs those who stream, and what they cost it: gaps between tokens, and the time to a first token.

    PYTHONPATH=. python benchmarks/gpu_gap.py FOLDER [--streams 64] [--prompt 8000] [--option …]

FOLDER holds config.json (and a tokenizer), no weights. Streams of 300 tokens run without and with long prompts that
arrive one after the other. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import DEFAULTS
from benchmarks.gpu_workload import parse_options
from tabstop.config import EngineConfig
from tabstop.engine import garbage
from tabstop.engine.build import build_core
from tabstop.engine.core import EngineCore
from tabstop.types import Limits, RequestId, Sampling, Submit, pack_ids

STREAM_TOKENS, STEPS_BETWEEN, NUM_PROMPTS, WARM_STEPS = 300, 60, 4, 20


@dataclass
class Clock:
    """Drives a core and remembers when tokens came."""

    core: EngineCore
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    counter: int = 0
    sent: dict[RequestId, float] = field(default_factory=dict)
    last: dict[RequestId, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    first: dict[RequestId, float] = field(default_factory=dict)  # seconds

    def send(self, num_prompt_tokens: int, num_tokens: int) -> RequestId:
        self.counter += 1
        ids = pack_ids(self.random.integers(300, 15_000, num_prompt_tokens))
        limits = Limits(num_tokens, stop_sets=())
        self.core.add(Submit((0, self.counter), ids, Sampling(temperature=0.0), limits), 0.0)
        self.sent[0, self.counter] = time.perf_counter()
        return 0, self.counter

    def step(self, pending: Any) -> Any:
        pending, deltas = self.core.step(pending, 0.0)
        now = time.perf_counter()
        for delta in deltas:
            assert delta.failure is None, delta.failure
            key = delta.request_id
            if key in self.last:
                self.gaps.append(now - self.last[key])
            self.first.setdefault(key, now - self.sent[key])
            self.last[key] = now
        return pending

    def run(self, num_streams: int, num_prompt_tokens: int, num_prompts: int) -> list[float]:
        """Until all is done; times to the first tokens of the long prompts, seconds."""
        for _ in range(num_streams):
            self.send(128, STREAM_TOKENS)
        pending, steps, prompts = None, 0, []
        while self.core.has_work() or pending or len(prompts) < num_prompts:
            steps += 1
            if steps % STEPS_BETWEEN == 0 and len(prompts) < num_prompts:
                prompts.append(self.send(num_prompt_tokens, 1))
            if steps == WARM_STEPS:
                self.gaps.clear()
            pending = self.step(pending)
        return [self.first[key] for key in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--option", action="append", default=[])
    arguments = parser.parse_args()
    options = DEFAULTS | {"max_model_len": 16384} | parse_options(arguments.option)
    core = build_core(EngineConfig(model=arguments.folder, load_format="dummy", device="cuda", **options))
    garbage.settle()
    Clock(core).run(0, arguments.prompt, 1)
    alone = float(np.median(Clock(core).run(0, arguments.prompt, NUM_PROMPTS)))
    without, beside = Clock(core), Clock(core)
    without.run(arguments.streams, arguments.prompt, 0)
    first = float(np.median(beside.run(arguments.streams, arguments.prompt, NUM_PROMPTS)))
    median, late = float(np.median(without.gaps)), float(np.quantile(beside.gaps, 0.99))
    values = {"gap_ms": median, "gap_p99_beside_ms": late, "ttft_alone_ms": alone, "ttft_beside_ms": first}
    ratios = {"gap_ratio": round(late / median, 2), "ttft_ratio": round(first / alone, 2)}
    rounded = {name: round(1000 * value, 2) for name, value in values.items()}
    print(json.dumps({"device": torch.cuda.get_device_name(), **options, **rounded, **ratios}))
    core.close()


if __name__ == "__main__":
    main()
