"""One side of benchmarks/cpu.py, in a process of its own that sleeps while the other side works.

    python benchmarks/cpu_sides.py ours|package|torch|float32 FILE     one of our engines, in process, without HTTP
    python benchmarks/cpu_sides.py peer FILE                    llama.cpp through llama-cpp-python's C functions

Reads one JSON command a line and answers with one JSON line. Commands: generate is timed; logits writes the next-token
logits of every position of a text, float32 [tokens, vocabulary], to a file; where says where a decode step's time goes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

import numpy as np

NUM_THREADS = len(os.sched_getaffinity(0))
MAX_TOKENS = 2048


class Side(Protocol):
    """Ids are int lists; times are seconds."""

    def generate(self, prompts: list[list[int]], num_new: int) -> tuple[float, float]:
        """Greedily, all at once: (until every prompt has its first token, until all is done)."""
        ...

    def logits(self, ids: list[int]) -> np.ndarray: ...


class Ours:
    """tabstop's engine core: scheduler, worker, sampler."""

    def __init__(self, model: str, kind: str) -> None:
        from tabstop.config import EngineConfig
        from tabstop.engine.build import build_core

        if kind in ("package", "torch"):
            from tabstop.kernels.cpu import build

            build.COMPILERS = ()
            if kind == "torch":
                build.PACKAGE = "no compiler"
        dtype = "float32" if kind == "float32" else "auto"
        self.core = build_core(EngineConfig(model=model, dtype=dtype, device="cpu", prefix_cache=False))
        self.counter = 0

    def generate(self, prompts: list[list[int]], num_new: int) -> tuple[float, float]:
        from tabstop.types import Limits, Sampling, Submit, pack_ids

        for ids in prompts:
            self.counter += 1
            limits = Limits(num_new, stop_sets=())
            self.core.add(Submit((0, self.counter), pack_ids(ids), Sampling(temperature=0.0), limits), 0.0)
        start, pending, started, first, num_tokens = time.perf_counter(), None, set(), 0.0, 0
        while self.core.has_work() or pending:
            pending, deltas = self.core.step(pending, 0.0)
            started |= {delta.request_id for delta in deltas if delta.token_ids}
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
            if not first and len(started) == len(prompts):
                first = time.perf_counter() - start
        assert num_tokens == len(prompts) * num_new
        return first, time.perf_counter() - start

    def where(self, ids: list[int], num_new: int) -> dict[str, float]:
        """Milliseconds of a decode step by what they go to, means over `num_new` steps. Only for steps in one call."""
        import ctypes
        from collections import defaultdict

        from tabstop.types import Limits, Sampling, Submit, pack_ids

        worker, spent = self.core.workers.worker, defaultdict(float)  # type: ignore[attr-defined]
        operations = worker.model.program.operations
        limits = Limits(num_new, stop_sets=())
        self.core.add(Submit((0, -1), pack_ids(ids), Sampling(temperature=0.0), limits), 0.0)
        for owner, name in ((worker.model, "logits"), (worker, "sample"), (worker.model.program, "run")):
            _timed(owner, name, spent)
        pending, num_tokens, start = None, 0, 0.0
        while self.core.has_work() or pending:
            pending, deltas = self.core.step(pending, 0.0)
            num_tokens += sum(len(delta.token_ids) for delta in deltas)
            if num_tokens and not start:
                worker.model.seconds = (ctypes.c_double * len(operations))()
                spent.clear()
                start = time.perf_counter()
        whole = time.perf_counter() - start
        names = {0: "norms", 2: "rotation and KV write", 3: "attention", 4: "rounding"}
        found: dict[str, float] = defaultdict(float)
        for operation, seconds in zip(operations, worker.model.seconds, strict=True):
            shape = operation.matrix.contents if operation.kind == 1 else None
            found[names.get(operation.kind) or f"{shape.rows} x {shape.columns}"] += seconds  # type: ignore[union-attr]
        found |= {"head": spent["logits"], "sampling": spent["sample"]}
        found["Python and the rest"] = whole - spent["logits"] - spent["sample"] - spent["run"]
        worker.model.seconds = None
        return {name: 1000 * seconds / (num_new - 1) for name, seconds in [*found.items(), ("whole step", whole)]}

    def logits(self, ids: list[int]) -> np.ndarray:
        import torch

        from tabstop.attention import AttentionBatch
        from tabstop.models import StepContext

        worker, count = self.core.workers.worker, len(ids)  # type: ignore[attr-defined]
        blocks = -(-count // worker.state.block_size)
        batch = AttentionBatch(
            query_lens=[count],
            context_lens=[count],
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            contexts=torch.tensor([count], dtype=torch.int32),
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            kv_slots=torch.arange(count),
        )
        context = StepContext(worker.attention, worker.attention.plan(batch), worker.kv)
        with torch.inference_mode():
            hidden = worker.model.forward(torch.tensor(ids), torch.arange(count), context)
            result: np.ndarray = worker.model.logits(hidden).float().numpy()
        return result


def _timed(owner: Any, name: str, spent: dict[str, float]) -> None:
    """Adds up the seconds of a method from now on."""
    function = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spent[name] += time.perf_counter() - start

    setattr(owner, name, timed)


class Peer:
    """llama.cpp at its best settings: flash attention, micro-batches of 512, all cores."""

    def __init__(self, model: str) -> None:
        import llama_cpp

        self.llama = llama_cpp
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        self.silent = silent  # lives as long as the library
        llama_cpp.llama_log_set(silent, None)
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), parameters)
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.batch = llama_cpp.llama_batch_init(MAX_TOKENS, 0, 1)
        self.contexts: dict[int, Any] = {}

    def context(self, num_sequences: int) -> Any:
        """One for each number of sequences, emptied."""
        llama = self.llama
        if num_sequences not in self.contexts:
            parameters = llama.llama_context_default_params()
            parameters.n_ctx = 256 * num_sequences if num_sequences > 1 else 8192
            parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = MAX_TOKENS, 512, num_sequences
            parameters.n_threads = parameters.n_threads_batch = NUM_THREADS
            parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
            self.contexts[num_sequences] = llama.llama_init_from_model(self.model, parameters)
        context = self.contexts[num_sequences]
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        return context

    def decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows: (token, position, sequence, whether its logits are wanted)."""
        for at, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[at], self.batch.pos[at], self.batch.n_seq_id[at] = token, position, 1
            self.batch.seq_id[at][0], self.batch.logits[at] = sequence, wanted
        self.batch.n_tokens = len(rows)
        status = self.llama.llama_decode(context, self.batch)
        assert status == 0, status

    def likeliest(self, context: Any, row: int) -> int:
        logits = self.llama.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def generate(self, prompts: list[list[int]], num_new: int) -> tuple[float, float]:
        context, start = self.context(len(prompts)), time.perf_counter()
        rows = [
            (token, position, sequence, position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        tokens = {}
        for at in range(0, len(rows), MAX_TOKENS):
            part = rows[at : at + MAX_TOKENS]
            self.decode(context, part)
            tokens |= {row[2]: self.likeliest(context, place) for place, row in enumerate(part) if row[3]}
        first = time.perf_counter() - start
        for step in range(num_new - 1):
            self.decode(context, [(tokens[n], len(ids) + step, n, True) for n, ids in enumerate(prompts)])
            tokens = {n: self.likeliest(context, n) for n in range(len(prompts))}
        return first, time.perf_counter() - start

    def logits(self, ids: list[int]) -> np.ndarray:
        context, found = self.context(1), []
        for first in range(0, len(ids), 64):  # outputs at once are limited
            part = ids[first : first + 64]
            self.decode(context, [(token, first + at, 0, True) for at, token in enumerate(part)])
            found += [
                np.ctypeslib.as_array(self.llama.llama_get_logits_ith(context, at), (self.vocab_size,)).copy()
                for at in range(len(part))
            ]
        return np.stack(found)


def main() -> None:
    kind, model = sys.argv[1:3]
    side: Side = Peer(model) if kind == "peer" else Ours(model, kind)
    described = side.core.info.kernels if isinstance(side, Ours) else {}
    print(
        json.dumps({"ready": described, "weight_bytes": getattr(side, "core", None) and side.core.info.weight_bytes}),
        flush=True,
    )  # type: ignore[attr-defined]
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "where":
            assert isinstance(side, Ours)
            answer: dict[str, Any] = side.where(command["ids"], command["num_new"])
        elif command["do"] == "logits":
            np.save(command["file"], side.logits(command["ids"]).astype(np.float32))
            answer = {}
        else:
            first, seconds = side.generate(command["prompts"], command["num_new"])
            answer = {"first": first, "seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
