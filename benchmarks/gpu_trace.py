"""Where a GPU step's time goes: the slowest steps of a load, and a trace by kernel of a few mixed and decode steps.

PYTHONPATH=. python benchmarks/gpu_trace.py FOLDER [--requests 1000] [--shared 448] [--option max_num_seqs=1024 …]

--shared: so many first tokens are the same in all prompts, which then have 512, and answers 64.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import DEFAULTS
from benchmarks.gpu_workload import NUM_NEW, parse_options, prompt_lengths
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.core import EngineCore
from tabstop.types import Limits, Sampling, Submit, pack_ids

NUM_TRACED = 4
NUM_KERNELS = 18


class Recorder:
    """Wraps the workers' launch to remember what each step was."""

    def __init__(self, core: EngineCore) -> None:
        self.shapes: list[tuple[int, int]] = []  # rows, tokens
        launch = core.workers.launch

        def recorded(plan):  # type: ignore[no-untyped-def]
            self.shapes.append((len(plan.rows), plan.num_tokens))
            return launch(plan)

        core.workers.launch = recorded  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at", default="40,200")
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--option", action="append", default=[])
    arguments = parser.parse_args()
    options = DEFAULTS | parse_options(arguments.option)
    core = build_core(EngineConfig(model=arguments.folder, load_format="dummy", device="cuda", **options))
    recorder, random = Recorder(core), np.random.default_rng(0)
    shared = random.integers(300, 15_000, arguments.shared)
    limits = Limits(64 if arguments.shared else NUM_NEW, stop_sets=())
    for n, length in enumerate(prompt_lengths(arguments.requests)):
        ids = random.integers(300, 15_000, 512 if arguments.shared else length)
        ids[: len(shared)] = shared
        core.add(Submit((0, n), pack_ids(ids), Sampling(temperature=0.0), limits), 0.0)
    traced_at = {int(text) for text in arguments.at.split(",")}
    times, pending, step = [], None, 0
    while core.has_work() or pending:
        if step in traced_at:
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
                for _ in range(NUM_TRACED):
                    pending, _ = core.step(pending, 0.0)
            print(f"--- {NUM_TRACED} steps from {step}, (rows, tokens): {recorder.shapes[-NUM_TRACED:]}")
            print(
                trace.key_averages().table(
                    sort_by="self_cuda_time_total", row_limit=NUM_KERNELS, max_name_column_width=60
                )
            )
            step += NUM_TRACED
            times += [0.0] * NUM_TRACED
            continue
        start = time.perf_counter()
        pending, _ = core.step(pending, 0.0)
        times.append(1000 * (time.perf_counter() - start))
        step += 1
    shapes = recorder.shapes
    for place in np.argsort(times)[::-1][:20]:
        print(f"step {place}: {times[place]:.1f} ms, (rows, tokens) {shapes[min(place, len(shapes) - 1)]}")
    mixed = [t for t, (rows, tokens) in zip(times, shapes, strict=False) if tokens > rows and t]
    decode = [t for t, (rows, tokens) in zip(times, shapes, strict=False) if tokens == rows and t]
    print(f"mixed steps: {len(mixed)}, {sum(mixed) / 1000:.2f} s, median {np.median(mixed):.2f} ms")
    print(f"decode steps: {len(decode)}, {sum(decode) / 1000:.2f} s, median {np.median(decode):.2f} ms")
    core.close()


if __name__ == "__main__":
    main()
