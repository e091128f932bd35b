"""The vectorised batch against a plain loop over rows and tokens."""

from __future__ import annotations

import numpy as np
import torch

from tabstop.engine.plan import PENDING, LateInputs, Row, StepPlan, TableUpdate
from tabstop.worker.batch import SlotState, pack_masks


def test_batch_equals_the_plain_loop():
    rng = np.random.default_rng(0)
    for block_size in (1, 3, 16):
        state = SlotState(8, 40, block_size, torch.device("cpu"))
        state.last_ids += torch.arange(100, 108)
        plan, expected = StepPlan(1), []
        blocks = iter(rng.permutation(400).tolist())
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
        batch = state.make_batch(plan)
        actual = zip(batch.ids.tolist(), batch.positions.tolist(), batch.attention.kv_slots.tolist(), strict=True)
        assert list(actual) == expected
        lens = [len(row.token_ids) for row in plan.rows]
        assert batch.attention.query_lens == lens
        assert batch.attention.query_starts.tolist() == [0, *np.cumsum(lens).tolist()]
        assert batch.attention.context_lens == [row.start + len(row.token_ids) for row in plan.rows]
        assert batch.attention.contexts.tolist() == batch.attention.context_lens
        drawing = [index for index, row in enumerate(plan.rows) if row.sample]
        assert batch.drawing_rows == drawing
        assert batch.last_tokens.tolist() == [sum(lens[: index + 1]) - 1 for index in drawing]
        assert batch.drawing_slots.tolist() == [plan.rows[index].slot for index in drawing]
        assert batch.drawing_positions.tolist() == [batch.attention.context_lens[index] for index in drawing]


def test_remembered_tokens_are_fed_as_pending():
    state = SlotState(4, 4, 4, torch.device("cpu"))
    first = StepPlan(1, tables=[TableUpdate(2, 0, [1])], rows=[Row(2, 0, [5, 6], True)])
    state.remember(state.make_batch(first), torch.tensor([42]))
    batch = state.make_batch(StepPlan(2, rows=[Row(2, 2, [PENDING], True)]))
    assert batch.ids.tolist() == [42] and batch.positions.tolist() == [2]


def test_masks_land_on_their_rows():
    state = SlotState(4, 4, 4, torch.device("cpu"))
    rows = [Row(0, 0, [1], False), Row(1, 0, [1], True), Row(2, 0, [1], True, True)]
    batch = state.make_batch(StepPlan(1, rows=rows))
    assert pack_masks(batch, LateInputs(), 40) is None
    masks = pack_masks(batch, LateInputs({2: np.array([5, 0], np.int32)}), 40)
    assert masks.tolist() == [[-1, -1], [5, 0]]
