"""Replay of a recorded trace: a CSV of time, input tokens, output tokens. Built in: Azure's code trace of 2023.

The built-in trace is part of AzurePublicDataset (CC-BY-4.0); data/README.md has the attribution.
"""

from __future__ import annotations

import csv
import datetime
import math
from importlib import resources
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from tabstop.bench.records import Session
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.lengths import MAX_LENGTH
from tabstop.bench.workloads.prompts import PromptMaker, turn_of
from tabstop.errors import InputError

BUILT_IN = {"azure-code": "azure-code-trace.csv"}
MAX_SPAN = 366 * 86400.0  # seconds; longer ones count milliseconds, or worse
COLUMNS = {
    "time": ("timestamp", "time", "arrival", "arrived_at"),
    "input": ("contexttokens", "input", "input_tokens", "request tokens", "input_length", "prompt_tokens"),
    "output": ("generatedtokens", "output", "output_tokens", "response tokens", "output_length", "completion_tokens"),
}


class Trace(msgspec.Struct, frozen=True):
    """Parallel arrays, ascending in time. unit: seconds since the first row; tokens. shape: (num_rows,)"""

    times: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray

    def part(self, skip: int, num: int | None) -> Trace:
        """`num` rows from row `skip` on, its times counted from its first row."""
        rows = slice(skip, None if num is None else skip + num)
        times = self.times[rows]
        return Trace(times - times[0] if len(times) else times, self.inputs[rows], self.outputs[rows])


def read_trace(source: str) -> Trace:
    """A built-in trace by name, or a CSV file. Raises InputError for a missing file, column or number."""
    if source in BUILT_IN:
        with resources.files("tabstop.bench").joinpath("data", BUILT_IN[source]).open(encoding="utf-8") as file:
            return _parse(file, source)
    path = Path(source)
    if not path.is_file():
        raise InputError(f"no trace {source!r}: give a CSV file or one of {', '.join(BUILT_IN)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            return _parse(file, source)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{source} is no CSV file: {error}") from None


def _parse(file: IO[str], source: str) -> Trace:
    reader = csv.reader(file)
    header = [name.strip().lower() for name in next(reader, [])]
    positions = {}
    for column, names in COLUMNS.items():
        found = [header.index(name) for name in names if name in header]
        if not found:
            raise InputError(
                f"{source} has no {column} column: it has {', '.join(header) or 'none'}; use one of {', '.join(names)}"
            )
        positions[column] = found[0]
    rows: list[tuple[float, int, int]] = []
    for number, row in enumerate(reader, 2):
        if row:
            try:
                input_tokens, output_tokens = (int(float(row[positions[name]])) for name in ("input", "output"))
                rows.append((_seconds(row[positions["time"]]), input_tokens, output_tokens))
                if not (0 <= input_tokens <= MAX_LENGTH and 0 <= output_tokens <= MAX_LENGTH):
                    raise ValueError
            except (ValueError, IndexError, OverflowError):
                raise InputError(
                    f"{source} line {number} is not a time and two numbers of tokens: {','.join(row)[:80]}"
                ) from None
    if not rows:
        raise InputError(f"{source} has no rows")
    table = np.array(sorted(rows), dtype=np.float64)
    if table[-1, 0] - table[0, 0] > MAX_SPAN:
        raise InputError(f"{source} spans more than a year: its times must be seconds, or dates")
    return Trace(table[:, 0] - table[0, 0], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64))


def _seconds(written: str) -> float:
    try:
        seconds = float(written)
    except ValueError:
        return datetime.datetime.fromisoformat(written).replace(tzinfo=datetime.UTC).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(written)
    return seconds


def replay(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """The trace's own send times and lengths, with random content."""
    trace = read_trace(spec.trace).part(spec.trace_skip, spec.num_requests)
    if len(trace.times) == 0:
        raise InputError(f"the trace ends before row {spec.trace_skip}: lower --trace-skip")
    content = spec.content_rng()
    limit = spec.max_input_tokens or int(trace.inputs.max())
    return [
        Session(
            index=index,
            start=float(time) / spec.trace_speed,
            turns=[
                turn_of(
                    maker.make(max(1, min(int(num_in), limit)), content),
                    maker,
                    max_tokens=max(1, int(num_out)),
                    ignore_end=True,
                    kind="trace",
                )
            ],
        )
        for index, (time, num_in, num_out) in enumerate(zip(trace.times, trace.inputs, trace.outputs, strict=True))
    ]
