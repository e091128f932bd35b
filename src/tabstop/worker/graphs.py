"""CUDA graphs of decode steps: one captured forward for each bucket of rows, replayed with new inputs.

A step qualifies when every row has one token and draws. Its inputs are padded to the bucket's shape (batch.py), so
nothing in the graph depends on the mix of requests. A graph looks up the tokens of the step before, draws and keeps the
next ones: between two replays nothing else runs. The eager forward (worker.py) is the twin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tabstop.engine.plan import Row, StepPlan
from tabstop.worker.batch import Buffer, Drawing, Numbers, Shape, SlotState, StepInputs

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 896, 1024)
"""Numbers of rows that get a graph; up to a sixth of a step's rows may be padding."""

NUM_WARM_UPS = 2
"""Eager runs before a capture: kernels are compiled and libraries choose their algorithms outside of it."""


@dataclass(slots=True)
class Captured:
    """One bucket's graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    buffer: Buffer
    logits: Tensor  # float32 [bucket, vocab]
    tokens: Tensor  # int64 [bucket] drawn from the logits as they are


class DecodeGraphs:
    """Captures on construction. `run`: inputs → (float32 logits [rows, vocab], tokens int64 [rows])."""

    def __init__(self, run: Callable[[StepInputs], tuple[Tensor, Tensor]], state: SlotState, numbers: Numbers) -> None:
        self._run = run
        self._state = state
        self._numbers = numbers
        max_num_seqs, self._num_blocks = state.tables.shape
        self._buckets = [bucket for bucket in BUCKETS if bucket < max_num_seqs] + [min(max_num_seqs, BUCKETS[-1])]
        self._pool = torch.cuda.graph_pool_handle()
        # Largest first: the others then live in its memory.
        self._captured = {bucket: self._capture(bucket) for bucket in reversed(self._buckets)}

    def serves(self, plan: StepPlan) -> bool:
        return len(plan.rows) <= self._buckets[-1] and all(row.sample and len(row.token_ids) == 1 for row in plan.rows)

    def replay(self, plan: StepPlan) -> tuple[Drawing, Tensor, Tensor]:
        """Logits float32 [R, vocab] and tokens int64 [R] drawn from them, valid until the next replay."""
        bucket = self._buckets[bisect_left(self._buckets, len(plan.rows))]
        captured = self._captured[bucket]
        _, drawing = self._state.fill(plan, captured.buffer, self._numbers)
        captured.graph.replay()
        return drawing, captured.logits[: len(plan.rows)], captured.tokens[: len(plan.rows)]

    def _capture(self, bucket: int) -> Captured:
        buffer = Buffer(Shape(bucket, bucket, self._num_blocks), self._state.device)
        rows = [Row(slot, 0, [0], sample=True) for slot in range(bucket)]
        inputs, _ = self._state.fill(StepPlan(0, rows=rows), buffer)
        inputs = self._at_most(inputs, bucket)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(NUM_WARM_UPS):
                self._run(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, tokens = self._run(inputs)
        return Captured(graph, buffer, logits, tokens)

    def _at_most(self, inputs: StepInputs, bucket: int) -> StepInputs:
        """Inputs whose host lengths are the largest that the graph must serve; those on the device are per replay."""
        inputs.attention.query_lens = [1] * bucket
        inputs.attention.context_lens = [self._num_blocks * self._state.block_size] * bucket
        inputs.has_unknown = True
        # A capture must write only scratch memory, whatever the tables say.
        inputs.attention.kv_slots.fill_(self._state.scratch_block * self._state.block_size)
        return inputs
