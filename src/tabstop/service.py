"""One call → token ids → Submits → text deltas. Knows text and the engine's waist; no HTTP, no JSON, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from tabstop.checkpoint import Checkpoint
from tabstop.config import ServerConfig
from tabstop.engine.client import EngineClient


class Service:
    """Models by name, each with its engines."""


def make_service(
    checkpoint: Checkpoint, engines: Sequence[EngineClient], config: ServerConfig, *, tokenizer: Checkpoint | None = None
) -> Service:
    """A service with one model: its tokenizer, template and defaults come from the checkpoint.

    `tokenizer`: where to take them from instead (--tokenizer). Raises StartupError subclasses.
    """
    raise NotImplementedError
