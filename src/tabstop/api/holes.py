"""What all paths that fill holes share: what is around one, how candidates are judged, what an answer says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabstop.api.schema import AroundHole, FileBody
from tabstop.call import Confidence
from tabstop.errors import InputError
from tabstop.text.fim import FillReport
from tabstop.text.fim_frames import DEFAULT_PATH, SourceFile, Surroundings

WHOLE_ONLY = ("distinct", "min_confidence")
"""What can be decided only when all of the text is there."""


def surroundings(body: AroundHole, more: Sequence[FileBody] = ()) -> Surroundings:
    """What a body says around its hole; `more` files come first."""
    files = [SourceFile(file.path or file.filename or DEFAULT_PATH, file.text) for file in (*more, *(body.files or ()))]
    return Surroundings(tuple(files), body.repo_name or "", body.path or "", body.language or "")


def hole_fields(body: AroundHole) -> dict[str, Any]:
    """Fields of Call. Raises InputError naming the parameter."""
    for name in WHOLE_ONLY:
        if body.stream and getattr(body, name) not in (None, False):
            raise InputError(f"{name} needs the whole answer; leave stream out", param=name)
    return {
        "healing": body.token_healing,
        "distinct": bool(body.distinct),
        "confidence": bool(body.confidence or body.min_confidence is not None),
        "min_confidence": body.min_confidence,
    }


def fill_object(fill: FillReport | None) -> dict[str, Any]:
    """`tabstop` of an answer: how its (first) hole was filled; nothing where there was none."""
    if fill is None:
        return {}
    shown: dict[str, Any] = {"fim": fill.family or False}
    if fill.order:
        shown["order"] = fill.order
    if fill.cut_tokens:
        shown["cut_tokens"] = fill.cut_tokens
    if fill.healed_tokens:
        shown["healed_tokens"] = fill.healed_tokens
    if fill.transcoded:
        shown["transcoded"] = fill.transcoded
    return {"tabstop": shown}


def confidence_object(confidence: Confidence | None) -> dict[str, Any]:
    """`tabstop` of a choice: how likely its tokens were; nothing where nobody asked."""
    if confidence is None:
        return {}
    known = {"mean": round(confidence.mean, 4), "min": round(confidence.minimum, 4)}
    return {"tabstop": {"confidence": known if confidence.num_tokens else None}}
