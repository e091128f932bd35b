"""One token budget over a hole's prefix, its suffix and other files: who gets how much, and cutting at line borders.

Encoding is given as a function, so nothing here knows a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tabstop.text.fim_frames import SourceFile
from tabstop.text.tokenizer import Encoding

Encode = Callable[[str], Encoding]

SHARES = (0.5, 0.2, 0.3)
"""Of prefix, suffix and files, when all want more than there is."""

LINE_STEP = 16
"""The prefix loses lines in steps of so many, so that its beginning (and what the cache knows of it) stays in place
while somebody types."""


def divide(budget: int, wants: Sequence[int], shares: Sequence[float] = SHARES) -> list[int]:
    """Tokens for each: at most what it wants, at least its share if it wants that; unused shares go to the first."""
    given = [min(want, int(budget * share)) for want, share in zip(wants, shares, strict=True)]
    for index, want in enumerate(wants):
        given[index] += max(0, min(want - given[index], budget - sum(given)))
    return given


def keep_end(text: str, budget: int, encode: Encode) -> str:
    """The end of a text, from a line border on, in at most `budget` tokens; within a line if not even one fits."""
    starts = [encoded[0] for encoded in encode(text).offsets]
    if len(starts) <= budget:
        return text
    if budget <= 0:
        return ""
    earliest = starts[len(starts) - budget]
    borders = [0, *(at + 1 for at, character in enumerate(text) if character == "\n")]
    for step in (LINE_STEP, 1):
        for border in borders[::step]:
            if earliest <= border < len(text) and len(encode(text[border:]).ids) <= budget:
                return text[border:]
    kept = text[earliest:]
    while len(encode(kept).ids) > budget:  # cut apart, a text may need a token more
        kept = kept[1:]
    return kept


def keep_start(text: str, budget: int, encode: Encode) -> str:
    """The start of a text, up to a line border, in at most `budget` tokens; within a line if not even one fits."""
    ends = [encoded[1] for encoded in encode(text).offsets]
    if len(ends) <= budget:
        return text
    if budget <= 0:
        return ""
    latest = ends[budget - 1]
    kept = text[: text.rfind("\n", 0, latest) + 1] or text[:latest]
    while len(encode(kept).ids) > budget:
        kept = kept[:-1]
    return kept


def keep_files(files: Sequence[SourceFile], budget: int, encode: Encode) -> list[SourceFile]:
    """The last files, which are nearest to the cursor; the first of them may lose lines at its end."""
    kept: list[SourceFile] = []
    for file in reversed(files):
        overhead = len(encode(f"{file.path}\n").ids) + 2
        size = len(encode(file.text).ids) + overhead
        text = file.text if size <= budget else keep_start(file.text, budget - overhead, encode)
        if text or not file.text:
            kept.append(SourceFile(file.path, text))
        budget -= size
        if budget <= 0:
            break
    return kept[::-1]
