"""The vectorised batch against a plain loop over rows and tokens, exact and padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tabstop.engine.plan import PENDING, LateInputs, Row, StepPlan, TableUpdate
from tabstop.worker.batch import Buffer, Shape, SlotState, pack_masks

CPU = torch.device("cpu")
SCRATCH = 400


def random_plan(rng: np.random.Generator, block_size: int) -> tuple[StepPlan, list[tuple[int, int, int]]]:
    """Five rows in eight slots, and by the plain loop (id, position, KV slot) of each token."""
    plan, expected = StepPlan(1), []
    blocks = iter(rng.permutation(SCRATCH).tolist())
    for slot in rng.permutation(8)[:5].tolist():
        start, length = int(rng.integers(0, 20)), int(rng.integers(1, 9))
        table = [next(blocks) for _ in range(-(-(start + length) // block_size))]
        half = len(table) // 2
        plan.tables += [TableUpdate(slot, 0, table[:half]), TableUpdate(slot, half, table[half:])]
        ids = rng.integers(0, 90, length).tolist()
        if slot % 2:
            ids[-1] = PENDING
        plan.rows.append(Row(slot, start, ids, sample=slot % 3 > 0))
        for offset, token in enumerate(ids):
            position = start + offset
            kv_slot = table[position // block_size] * block_size + position % block_size
            expected.append((100 + slot if token == PENDING else token, position, kv_slot))
    return plan, expected


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("padding", [0, 7])
def test_batch_equals_the_plain_loop(block_size, padding):
    rng = np.random.default_rng(block_size)
    state = SlotState(np.zeros((8, 40), np.int32), block_size, SCRATCH, CPU)
    state.last_ids += torch.arange(100, 109)
    plan, expected = random_plan(rng, block_size)
    state.apply_tables(plan)
    exact = state.exact_shape(plan)
    shape = Shape(exact.num_tokens + padding, exact.num_rows + padding, exact.num_blocks + padding)
    buffer = Buffer(shape, CPU)
    for view in buffer.host.values():
        view[:] = 77  # whatever the last step left
    inputs, drawing = state.fill(plan, buffer)
    batch, num_tokens, num_rows = inputs.attention, len(expected), len(plan.rows)
    actual = zip(state.known_ids(inputs).tolist(), inputs.positions.tolist(), batch.kv_slots.tolist(), strict=True)
    assert list(actual) == expected + [(0, 0, SCRATCH * block_size)] * padding
    lens = [len(row.token_ids) for row in plan.rows]
    contexts = [row.start + len(row.token_ids) for row in plan.rows]
    assert batch.query_lens == lens and batch.context_lens == contexts
    assert batch.query_starts.tolist() == [0, *np.cumsum(lens).tolist()] + [num_tokens] * padding
    assert batch.contexts.tolist() == contexts + [0] * padding
    assert inputs.last_tokens[:num_rows].tolist() == [sum(lens[: index + 1]) - 1 for index in range(num_rows)]
    drawn = [index for index, row in enumerate(plan.rows) if row.sample]
    kept = [row.slot if row.sample else state.no_slot for row in plan.rows]
    assert inputs.slots.tolist() == kept + [state.no_slot] * padding
    assert drawing.rows.tolist() == drawn
    assert drawing.slots.tolist() == [plan.rows[index].slot for index in drawn]
    assert drawing.positions.tolist() == [contexts[index] for index in drawn]


def fill(state: SlotState, plan: StepPlan):
    state.apply_tables(plan)
    return state.fill(plan, Buffer(state.exact_shape(plan), CPU))


def test_remembered_tokens_are_fed_as_pending():
    state = SlotState(np.zeros((4, 4), np.int32), 4, SCRATCH, CPU)
    _, drawing = fill(state, StepPlan(1, tables=[TableUpdate(2, 0, [1])], rows=[Row(2, 0, [5, 6], True)]))
    state.remember(drawing, torch.tensor([42]))
    inputs, _ = fill(state, StepPlan(2, rows=[Row(2, 2, [PENDING], True)]))
    assert state.known_ids(inputs).tolist() == [42] and inputs.positions.tolist() == [2]


def test_numbers_of_draws_travel_with_the_rows():
    state = SlotState(np.zeros((4, 4), np.int32), 4, SCRATCH, CPU)
    plan = StepPlan(1, tables=[TableUpdate(2, 0, [1])], rows=[Row(2, 3, [5], True), Row(0, 0, [5], True)])
    state.apply_tables(plan)
    buffer = Buffer(Shape(3, 3, 1), CPU)
    inputs, _ = state.fill(plan, buffer, lambda slots, positions: (slots / 4, positions / 8))
    assert inputs.temperature[:2].tolist() == [0.5, 0.0] and inputs.uniform[:2].tolist() == [0.5, 0.125]


@pytest.mark.parametrize("num_rows", [1, 5, 8, 33])
def test_every_view_is_aligned(num_rows):
    buffer = Buffer(Shape(num_rows + 2, num_rows, 3), CPU)
    base = buffer.device["ids"].data_ptr()
    assert all((view.data_ptr() - base) % 16 == 0 for view in buffer.device.values())


def test_masks_land_on_their_rows():
    state = SlotState(np.zeros((4, 4), np.int32), 4, SCRATCH, CPU)
    rows = [Row(0, 0, [1], False), Row(1, 0, [1], True), Row(2, 0, [1], True, True)]
    _, drawing = fill(state, StepPlan(1, rows=rows))
    assert pack_masks(drawing, LateInputs(), 40) is None
    masks = pack_masks(drawing, LateInputs({2: np.array([5, 0], np.int32)}), 40)
    assert masks.tolist() == [[-1, -1], [5, 0]]
