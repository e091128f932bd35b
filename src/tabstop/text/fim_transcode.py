"""Raw prompts in another family's markers → the hole that they describe.

Editors often choose a template by guess. A prompt counts only if it is exactly one layout: each marker once, in order,
nothing before the first, the middle marker at the very end.
"""

from __future__ import annotations

from collections.abc import Callable

from tabstop.text.fim import Hole
from tabstop.text.fim_families import FAMILIES, PSM, SPM, Family

BARE = "▁"


def parse_foreign(text: str, has_token: Callable[[str], bool]) -> tuple[str, Hole] | None:
    """(family, hole) of a prompt in markers that the loaded vocabulary lacks; None for every other prompt."""
    for family in FAMILIES:
        markers = (family.prefix, family.suffix, family.middle)
        if not family.middle or any(map(has_token, markers)) or not text.endswith(family.middle.removeprefix(BARE)):
            continue
        for order in (PSM, SPM):
            hole = _parse(text, family, order)
            if hole is not None:
                return family.name, hole
    return None


def _parse(text: str, family: Family, order: tuple[str, ...]) -> Hole | None:
    is_spaced = family.prefix.startswith(BARE)  # CodeLlama as text: `<PRE> P <SUF>S <MID>`
    spelled = [family.marker(part).removeprefix(BARE) for part in order if part not in ("P", "S")]
    if any(text.count(marker) != 1 for marker in spelled):
        return None
    places = [text.index(marker) for marker in spelled]
    if places != sorted(places) or places[0] != 0:
        return None
    first = text[len(spelled[0]) : places[1]]
    second = text[places[1] + len(spelled[1]) : places[2]]
    prefix, suffix = (first, second) if order[1] == "P" else (second, first)
    if is_spaced:
        prefix, suffix = prefix.removeprefix(" ").removesuffix(" "), suffix.removesuffix(" ")
    return Hole(prefix, suffix)
