"""Draws one token for each row of a batch that mixes all kinds of requests.

A sampler is a list of steps (steps.py), each a function over the logits of the rows that need it; a step costs nothing
when no row does. Parameters live per slot on the host (filled at admission), so deciding what is needed never waits for
the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tabstop.engine.plan import Admission
from tabstop.kernels import sample
from tabstop.sampling.batch import PARAMETERS, SamplingBatch, SlotLists, parameters_of
from tabstop.sampling.history import History, upload
from tabstop.sampling.logprobs import Reported, report
from tabstop.sampling.random import uniform
from tabstop.sampling.steps import ROWS_AT_ONCE, STEPS, Step


def _needed(batch: SamplingBatch) -> list[tuple[Step, np.ndarray]]:
    """The steps that are needed, and the rows that need them, int64 [n]."""
    found = ((step, np.flatnonzero(step.rows(batch))) for step in STEPS)
    return [(step, rows) for step, rows in found if rows.size]


def _changed(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The logits after all steps: new ones, if there are any."""
    steps = _needed(batch)
    logits = logits.clone() if steps else logits
    for step, rows in steps:
        _run_step(step, logits, batch, rows)
    return logits


def _run_step(step: Step, logits: Tensor, batch: SamplingBatch, rows: np.ndarray) -> None:
    """Changes those rows of the logits in place."""
    if logits.is_cuda and step.on_card is not None:
        step.on_card(logits, upload(rows, logits.device), batch.part(rows))
        return
    if len(rows) == len(logits) <= ROWS_AT_ONCE:
        changed = step.apply(logits, batch)
        if changed is not logits:
            logits.copy_(changed)
        return
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        places = upload(some, logits.device)
        logits.index_copy_(0, places, step.apply(logits.index_select(0, places), batch.part(some)))


def draw(logits: Tensor, temperature: np.ndarray, uniform: np.ndarray) -> Tensor:
    """The tokens: argmax of greedy rows; of others, the one where the cumulative probability passes the draw's number.

    logits float32 [N, vocab] → int64 [N]. A GPU draws by its own kernel (kernels/sample.py), in float32.
    """
    if logits.is_cuda:
        numbers = (upload(temperature, logits.device), upload(uniform.astype(np.float32), logits.device))
        return sample.draw(logits, *numbers)
    random_rows = np.flatnonzero(temperature > 0)
    if random_rows.size == len(logits):
        return sample.draw_blocks(logits, torch.from_numpy(temperature), torch.from_numpy(uniform))
    tokens = logits.argmax(-1)
    if random_rows.size:
        rows = torch.from_numpy(random_rows)
        numbers = (torch.from_numpy(temperature[random_rows]), torch.from_numpy(uniform[random_rows]))
        tokens[rows] = sample.draw_blocks(logits[rows], *numbers)
    return tokens


class Sampler:
    """Parameters by slot, and the list of steps."""

    def __init__(self, max_num_seqs: int, device: torch.device | None = None) -> None:
        """`device`: where logits are; None: the CPU."""
        self._parameters = np.zeros(max_num_seqs, PARAMETERS)
        self._lists = SlotLists()
        self._history = History(device or torch.device("cpu"))
        self._is_special = np.zeros(max_num_seqs, np.bool_)  # slots that ever need a step; most have none

    def admit(self, admissions: Iterable[Admission]) -> None:
        slots = []
        for admission in admissions:
            slots.append(admission.slot)
            self._parameters[admission.slot] = parameters_of(admission)
            self._lists.admit(admission)
            self._history.admit(admission.slot, admission.history)
        if slots:
            batch = self._batch(np.array(slots), np.zeros(len(slots), np.int64), None)
            self._is_special[slots] = np.logical_or.reduce([step.rows(batch) for step in STEPS])

    def takes_logits_as_they_are(self, slots: np.ndarray, positions: np.ndarray) -> bool:
        """Whether no step is needed for these draws, masks aside: `numbers` are all that they need."""
        return not self._is_special[slots].any() or not _needed(self._batch(slots, positions, None))

    def numbers(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(temperature, uniform) of slots and of the positions of their tokens to draw, float32 [N] each."""
        return self._parameters["temperature"][slots], self._uniform(slots, positions).astype(np.float32)

    def sample(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray, masks: np.ndarray | None) -> Tensor:
        """logits float32 [N, vocab], slots and positions of the tokens to draw int64 [N] → int64 [N].

        The logits stay as they are.
        """
        if masks is not None or self._is_special[slots].any():
            logits = _changed(logits, self._batch(slots, positions, masks))
        tokens = draw(logits, self._parameters["temperature"][slots], self._uniform(slots, positions))
        self._history.remember(slots, positions, tokens)
        return tokens

    def report(self, logits: Tensor, tokens: Tensor, slots: np.ndarray, places: np.ndarray) -> Reported | None:
        """What the model thought of the tokens of those slots, int64 [N]; None where nobody asks.

        `places`: int64 [N], where they are in logits float32 [R, vocab] and tokens int64 [R].
        """
        wanted = self._parameters["num_logprobs"][slots]
        rows = np.flatnonzero(wanted >= 0)
        if not rows.size:
            return None
        wanted, where = wanted[rows], upload(places[rows], logits.device)
        known = tokens[where].clamp(min=0)  # NO_TOKEN has logits that are no numbers, whichever is looked at
        found = report(lambda some: logits.index_select(0, some), where, known, int(wanted.max()))
        return Reported(rows, wanted, *found)

    def _batch(self, slots: np.ndarray, positions: np.ndarray, masks: np.ndarray | None) -> SamplingBatch:
        return SamplingBatch(slots, positions, self._parameters[slots], masks, self._lists, self._history)

    def _uniform(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        seed, candidate = (self._parameters[name][slots] for name in ("seed", "candidate"))
        return uniform(seed, candidate, positions.astype(np.uint64))
