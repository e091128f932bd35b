"""Finds a model and reads what it says of itself, without its weights: one view of folders, GGUF files and Hub ids.

Shared by the front end (tokenizer, chat template, limits) and the engine (architecture, weights), so it imports neither
torch nor transformers. GGUF metadata is translated into the shape of the Hub's JSON files; who reads `config` need not
know where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tabstop.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A located model. Exactly one of `folder` and `gguf` is set."""

    name: str  # as the user gave it, or the default model's name; the default of --served-model-name
    folder: Path | None = None
    gguf: Path | None = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, or its equivalent from GGUF metadata (with `architectures`). Raises CheckpointError."""
        raise CheckpointError("not written yet")

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json (sampling defaults, eos_token_id: int or list); empty when there is none."""
        return {}

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """tokenizer_config.json (chat_template, bos_token, add_bos_token, …), or the same from GGUF metadata."""
        return {}

    @cached_property
    def gguf_metadata(self) -> Mapping[str, Any]:
        """All GGUF key-value pairs as Python values (the vocabulary and merges included); empty for a folder."""
        return {}


def open_checkpoint(model: str, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Locates a folder, a .gguf file, 'default' or a Hub id (downloaded unless offline).

    Raises CheckpointError with what was looked for, and what to do.
    """
    raise CheckpointError(f"cannot open {model!r}: not written yet")
