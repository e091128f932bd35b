"""Keeps Python's garbage collector from stopping every stream."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 50_000
"""Net allocations between two collections. A step of a thousand rows makes some thousand objects and drops them again
without help; at the default threshold of 700 every twentieth step was a full collection, of 90 ms on one machine."""

_usual = gc.get_threshold()


def settle() -> None:
    """Call when everything that stays has been made: it is never looked at again, and collections become rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def resume() -> None:
    """Call when it need not stay any more, in a process that goes on: a model is full of cycles, and frozen ones would
    keep its memory for ever."""
    gc.unfreeze()
    gc.set_threshold(*_usual)
    gc.collect()
