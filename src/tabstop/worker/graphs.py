"""CUDA graphs of whole steps: captured for some numbers of tokens and rows, replayed with new inputs.

Inputs are padded to the sizes of the smallest graph that holds them (batch.py), and attention finds its work on the
device, so nothing in a graph depends on the mix of prompts and decoding rows. A graph looks up the tokens of the step
before, draws and keeps the next ones: between two replays nothing else runs, and a step of hundreds of kernels is one
launch. The eager forward (worker.py) is the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tabstop.engine.plan import Row, StepPlan
from tabstop.worker.batch import Buffer, Drawing, Numbers, Shape, SlotState, StepInputs

DECODING = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 640, 768, 896, 1024)
"""Numbers of rows of one token each; up to a sixth of a step's rows may be padding."""

REHEARSED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Of them, those whose kernels differ: few rows split their contexts, and multiply by vectors."""

MIXED = (16, 32, 64, 128, 192, 256, 288, 320, 384, 512, 576, 640, 768, 896, 1024, 1536, 2048)
"""Numbers of tokens of steps that have prompts: denser where matrices are bound by reading them."""

MIXED_ROWS = (64, 256, 512, 768, 1024)
"""Numbers of rows of such steps: padding costs a program that ends at once, and a row of logits."""

LONG = 1 << 20
"""More tokens than a row that is attended as a decoding one may have."""


@dataclass(slots=True)
class Captured:
    """One graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    buffer: Buffer
    logits: Tensor  # float32 [rows, vocab], a view of memory that belongs to all graphs
    tokens: Tensor  # int64 [rows] drawn from the logits as they are


class StepGraphs:
    """`run`: inputs → (float32 logits [rows, vocab], tokens int64 [rows])."""

    def __init__(self, run: Callable[[StepInputs], tuple[Tensor, Tensor]], state: SlotState, numbers: Numbers) -> None:
        self._run = run
        self._state = state
        self._numbers = numbers
        self._max_num_seqs, self._num_blocks = state.tables.shape
        self._pool = torch.cuda.graph_pool_handle()
        # One for all captures: the matrix library keeps a workspace for each stream that it meets.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._mixed: dict[tuple[int, int], Captured] = {}
        self._decoding: dict[tuple[int, int], Captured] = {}

    def rehearse(self, run: Callable[[StepInputs], None], num_tokens: int) -> None:
        """Runs steps of all kinds that have kernels of their own, as they would be captured for up to `num_tokens`."""
        most = min(num_tokens, self._max_num_seqs)
        run(self._inputs(*max(mixed_sizes(num_tokens, self._max_num_seqs)), is_mixed=True)[1])
        for number in sorted({most, *(number for number in REHEARSED if number < most)}):
            run(self._inputs(number, number, is_mixed=False)[1])

    def capture_largest(self, num_tokens: int) -> None:
        """Only the graph for the largest steps of up to `num_tokens`; it takes nearly all the memory that all do."""
        size = max(mixed_sizes(num_tokens, self._max_num_seqs))
        self._mixed[size] = self._capture(*size, is_mixed=True)

    def capture_all(self, num_tokens: int) -> None:
        """For steps of up to `num_tokens`."""
        # Largest first: the others then live in its memory.
        for size in sorted(mixed_sizes(num_tokens, self._max_num_seqs), reverse=True):
            self._mixed[size] = self._capture(*size, is_mixed=True)
        most = min(num_tokens, self._max_num_seqs, DECODING[-1])
        for number in [most, *(number for number in reversed(DECODING) if number < most)]:
            self._decoding[number, number] = self._capture(number, number, is_mixed=False)

    def find(self, plan: StepPlan) -> Captured | None:
        """The smallest graph that holds the plan, if one does."""
        num_rows, num_tokens = len(plan.rows), plan.num_tokens
        captured = self._decoding if num_rows == num_tokens else self._mixed
        fitting = [size for size in captured if size[0] >= num_tokens and size[1] >= num_rows]
        return captured[min(fitting)] if fitting else None

    def replay(self, plan: StepPlan, captured: Captured) -> tuple[Drawing, Tensor, Tensor]:
        """(which rows draw, logits float32 [R, vocab], tokens int64 [R]) of all rows, valid until the next replay."""
        _, drawing = self._state.fill(plan, captured.buffer, self._numbers)
        captured.graph.replay()
        return drawing, captured.logits[: len(plan.rows)], captured.tokens[: len(plan.rows)]

    def _inputs(self, num_tokens: int, num_rows: int, *, is_mixed: bool) -> tuple[Buffer, StepInputs]:
        buffer = Buffer(Shape(num_tokens, num_rows, self._num_blocks, self._state.sharing_width), self._state.device)
        rows = [Row(slot, 0, [0], sample=True) for slot in range(num_rows)]
        inputs, _ = self._state.fill(StepPlan(0, rows=rows), buffer)
        return buffer, self._at_most(inputs, num_tokens, num_rows, is_mixed=is_mixed)

    def _capture(self, num_tokens: int, num_rows: int, *, is_mixed: bool) -> Captured:
        buffer, inputs = self._inputs(num_tokens, num_rows, is_mixed=is_mixed)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Outside of the capture kernels are compiled, and libraries choose their algorithms.
            self._run(inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            logits, tokens = self._run(inputs)
        return Captured(graph, buffer, _borrowed(logits), tokens)

    def _at_most(self, inputs: StepInputs, num_tokens: int, num_rows: int, *, is_mixed: bool) -> StepInputs:
        """Inputs whose host lengths bound what the graph must serve; those on the device come with each replay."""
        num_prompts = min(num_rows, num_tokens) if is_mixed else 0
        inputs.attention.query_lens = [1] * num_rows + [LONG] * num_prompts
        inputs.attention.context_lens = [self._num_blocks * self._state.block_size] * num_rows
        inputs.has_unknown = True
        # A capture must write only scratch memory, whatever the tables say.
        inputs.attention.kv_slots.fill_(self._state.scratch_block * self._state.block_size)
        return inputs


def mixed_sizes(num_tokens: int, max_num_seqs: int) -> Iterator[tuple[int, int]]:
    """(tokens, rows) of the graphs for steps with prompts, of up to `num_tokens`."""
    tokens = [*(number for number in MIXED if number < num_tokens), min(num_tokens, MIXED[-1])]
    for number in tokens:
        most = min(number, max_num_seqs)
        yield from ((number, rows) for rows in {*(each for each in MIXED_ROWS if each < most), most})


class _Memory:
    """Device memory that somebody else frees, in the form that torch takes from other libraries."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(logits: Tensor) -> Tensor:
    """The same memory, not owned: graphs that are captured later may use it, or each would keep logits of its own.

    What a replay left there stays until another graph of the pool is replayed.
    """
    return torch.as_tensor(_Memory(logits), device=logits.device)
