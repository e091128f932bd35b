"""What the steps of a sampler know: parameters by slot on the host, and the rows that draw in one step.

Everything that decides whether a step is needed is host memory, so deciding never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tabstop.engine.plan import Admission
from tabstop.sampling.history import History, upload

PARAMETERS = np.dtype(
    [
        ("temperature", np.float32),  # 0: greedy
        ("top_k", np.int64),  # 0: all
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("typical_p", np.float64),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("penalty_window", np.int64),
        ("seed", np.uint64),
        ("candidate", np.uint64),
        ("num_logprobs", np.int64),  # -1: none are wanted
        ("prompt_end", np.int64),  # the position of the first output token
        ("stoppable_from", np.int64),  # the first position that a stop token may have
        ("has_bias", np.bool_),
        ("has_allowed", np.bool_),
        ("has_banned_runs", np.bool_),
    ]
)
"""One slot's numbers; see types.Sampling."""

COPIED = PARAMETERS.names[:9] if PARAMETERS.names else ()
"""Those that are fields of Sampling as they are."""


def parameters_of(admission: Admission) -> np.ndarray:
    """PARAMETERS [] of a sequence."""
    sampling, start = admission.sampling, admission.num_prompt_tokens
    found = np.zeros((), PARAMETERS)
    for name in COPIED:
        found[name] = getattr(sampling, name)
    found["seed"], found["candidate"] = sampling.seed % 2**64, admission.candidate
    found["num_logprobs"] = -1 if sampling.num_logprobs is None else sampling.num_logprobs
    found["prompt_end"] = start
    found["stoppable_from"] = start + admission.min_tokens if admission.stop_ids else 0
    found["has_bias"] = bool(sampling.logit_bias) or any(len(run) == 1 for run in sampling.banned)
    found["has_allowed"] = bool(sampling.allowed_token_ids)
    found["has_banned_runs"] = any(len(run) > 1 for run in sampling.banned)
    return found


@dataclass(slots=True)
class SlotLists:
    """What has no fixed length, by slot; only of slots that have it."""

    biases: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # ids int64, values float32
    stops: dict[int, np.ndarray] = field(default_factory=dict)  # int64
    allowed: dict[int, np.ndarray] = field(default_factory=dict)  # int64
    banned_runs: dict[int, np.ndarray] = field(default_factory=dict)  # int64 [runs, longest], -1 before shorter ones

    def admit(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        every: tuple[dict[int, Any], ...] = (self.biases, self.stops, self.allowed, self.banned_runs)
        for by_slot in every:
            by_slot.pop(slot, None)
        pairs = [*sampling.logit_bias, *((run[0], -np.inf) for run in sampling.banned if len(run) == 1)]
        if pairs:
            ids, values = zip(*pairs, strict=True)
            self.biases[slot] = np.array(ids, np.int64), np.array(values, np.float32)
        if admission.stop_ids:
            self.stops[slot] = np.array(sorted(admission.stop_ids), np.int64)
        if sampling.allowed_token_ids:
            self.allowed[slot] = np.array(sampling.allowed_token_ids, np.int64)
        if runs := [run for run in sampling.banned if len(run) > 1]:
            longest = max(map(len, runs))
            self.banned_runs[slot] = np.array([(-1,) * (longest - len(run)) + run for run in runs], np.int64)


@dataclass(slots=True)
class SamplingBatch:
    """The drawing rows of a step; one entry a row."""

    slots: np.ndarray  # int64 [N]
    positions: np.ndarray  # int64 [N] of the tokens to draw
    parameters: np.ndarray  # PARAMETERS [N]
    masks: np.ndarray | None  # int32 [N, ceil(vocab / 32)] bits of allowed tokens, None when no row has one
    lists: SlotLists
    history: History

    def part(self, rows: np.ndarray) -> SamplingBatch:
        """Only those rows, int64 [n]."""
        masks = None if self.masks is None else self.masks[rows]
        slots, positions = self.slots[rows], self.positions[rows]
        return SamplingBatch(slots, positions, self.parameters[rows], masks, self.lists, self.history)

    def column(self, name: str, device: torch.device) -> Tensor:
        """A parameter as [N, 1] on the device; temperature 1 where it is 0, so that one may divide by it."""
        values = np.array(self.parameters[name])  # a run of its own
        if name == "temperature":
            values = np.where(values > 0, values, np.float32(1))
        return upload(values, device)[:, None]


def pad_ids(lists: list[np.ndarray], padding: float) -> np.ndarray:
    """Arrays [n_i] or [n_i, m_i] → one, padded at the end of their first and the start of their second dimension."""
    shape = tuple(max(sizes) for sizes in zip(*(entry.shape for entry in lists), strict=True))
    padded = np.full((len(lists), *shape), padding, lists[0].dtype)
    for target, entry in zip(padded, lists, strict=True):
        if entry.ndim == 1:
            target[: len(entry)] = entry
        else:
            target[: len(entry), shape[1] - entry.shape[1] :] = entry
    return padded
