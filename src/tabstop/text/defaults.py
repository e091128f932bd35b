"""What a checkpoint says of generating: sampling defaults, end tokens, and the stop sets that the engine knows by name.

Shared by the front end (defaults of a request) and the engine process (`stop_sets`, once at start).
"""

from __future__ import annotations

import math

from tabstop.checkpoint import Checkpoint
from tabstop.text.fim_detection import stop_token_ids
from tabstop.text.tokenizer import Tokenizer
from tabstop.types import Sampling


def sampling_defaults(checkpoint: Checkpoint) -> Sampling:
    """temperature, top_k and top_p of generation_config.json where a client gives none; else 1, all, all.

    Values that no sampler could use are ignored.
    """
    temperature, top_k, top_p = (
        _number(checkpoint.generation_config.get(key)) for key in ("temperature", "top_k", "top_p")
    )
    return Sampling(
        temperature=temperature if temperature is not None and temperature >= 0 else 1.0,
        top_k=int(top_k) if top_k is not None and top_k > 0 else 0,
        top_p=top_p if top_p is not None and 0 < top_p <= 1 else 1.0,
    )


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends an answer: generation_config's, config's, then tokenizer_config's; no duplicates."""
    named = tokenizer.token_id(checkpoint.tokenizer_config.get("eos_token") or "")
    return tuple(dict.fromkeys((*checkpoint.eos_token_ids, *([] if named is None else [named]))))


def stop_sets(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, frozenset[int]]:
    """Sets of ids that requests name in Limits.stop_sets.

    `eos` · `newline`: every token whose text holds one · `fim`: what ends the text of a hole in any family.
    """
    newline = (token_id for token_id, spelled in enumerate(tokenizer.token_bytes) if b"\n" in spelled)
    return {
        "eos": frozenset(eos_token_ids(checkpoint, tokenizer)),
        "newline": frozenset(newline),
        "fim": stop_token_ids(tokenizer),
    }
