"""The corpus, and each of its files a little damaged, through its target: nothing but a TabstopError may come of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.seeds import CORPUS, files
from tests.fuzz.targets import TARGETS, refusals

NUM_DAMAGED = {"gguf": 60, "safetensors": 100, "config": 100, "template": 20, "body": 60, "events": 20, "frame": 30}
MAX_BYTES = 128 << 10  # of the whole corpus


def damaged(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or replaced by numbers at the edge."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at, length = generator.randrange(len(changed) + 1), generator.choice((1, 1, 2, 4, 8, 50))
        edge = generator.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"9", b'"', b"-1", b"1e999", b"null", b"[", b"{}"))
        match generator.randrange(5):
            case 0:
                changed[at : at + length] = generator.randbytes(length)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at : at + length] = (edge * 8)[:length]
            case 4:
                changed[at : at + len(edge)] = edge
    return bytes(changed)


def corpus(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_and_damage_to_it(target: str) -> None:
    generator = random.Random(target)
    paths = corpus(target)
    for path in paths:
        TARGETS[target](path.read_bytes())
    for index in range(max(NUM_DAMAGED[target], len(paths))):
        data = damaged(paths[index % len(paths)].read_bytes(), generator)
        try:
            TARGETS[target](data)
        except BaseException:
            print(f"{target}: {data!r}")
            raise


def test_the_corpus_is_small_and_has_every_seed() -> None:
    stored = {str(path.relative_to(CORPUS)): path.read_bytes() for target in TARGETS for path in corpus(target)}
    assert sum(map(len, stored.values())) < MAX_BYTES
    assert set(files()) <= set(stored)


@pytest.mark.parametrize("target", ["gguf", "safetensors", "config", "body"])
def test_seeds_are_not_refused(target: str) -> None:
    """Damage to what stops at the door would show nothing."""
    refusals.clear()
    for name, data in files().items():
        if name.startswith(f"{target}/"):
            TARGETS[target](data)
    assert not refusals
