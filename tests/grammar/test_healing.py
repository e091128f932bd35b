"""The healing constraint over any small vocabulary, and in the engine: answers spell what they must, then are free."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.errors import InputError
from tabstop.grammar import NO_IDS, Vocabulary, compile_constraint
from tabstop.grammar.trie import TokenTrie
from tabstop.types import ConstraintSpec, Limits, Sampling
from tests.engine.driver import Driver
from tests.engine.simulated import VOCAB, make_core

BYTES = st.binary(max_size=6).map(lambda data: bytes(byte % 3 + (253 if byte > 200 else 0) for byte in data))
VOCABULARIES = st.lists(BYTES, min_size=1, max_size=40)


@given(VOCABULARIES, BYTES.filter(len))
def test_the_trie_finds_what_a_scan_finds(tokens: list[bytes], piece: bytes) -> None:
    trie = TokenTrie(tokens)
    assert sorted(trie.extending(piece)) == [i for i, token in enumerate(tokens) if token.startswith(piece)]
    assert sorted(trie.spelling(piece)) == [i for i, token in enumerate(tokens) if token == piece]
    assert trie.is_extended(piece) == any(token.startswith(piece) and token != piece for token in tokens)


def bits(mask: np.ndarray, size: int) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:size]).tolist()


@given(VOCABULARIES, BYTES, st.data())
def test_every_way_through_spells_the_target(tokens: list[bytes], target: bytes, data: st.DataObject) -> None:
    """No dead end, nothing forbidden that could lead there; rolling back restores every state."""
    vocabulary = Vocabulary(len(tokens) + 3, lambda: tokens)
    reachable = {len(target)}
    for place in reversed(range(len(target))):
        rest = target[place:]
        if any(t and (t.startswith(rest) or (rest.startswith(t) and place + len(t) in reachable)) for t in tokens):
            reachable.add(place)
    if 0 not in reachable:
        with pytest.raises(InputError, match="cannot spell"):
            compile_constraint(ConstraintSpec("healing", target.hex()), vocabulary)
        return
    constraint = compile_constraint(ConstraintSpec("healing", target.hex()), vocabulary)
    spelled, masks = b"", []
    while not constraint.released:
        mask = np.full(-(-vocabulary.size // 32), -1, dtype=np.int32)
        constraint.fill(mask, NO_IDS)
        allowed = bits(mask, vocabulary.size)
        assert allowed == [
            i for i, t in enumerate(tokens)
            if t and (t.startswith(target[len(spelled):])
                      or (target.startswith(spelled + t) and len(spelled) + len(t) in reachable))
        ]  # fmt: skip
        masks.append(mask)
        other = constraint.fork()
        token_id = data.draw(st.sampled_from(allowed))
        constraint.accept(token_id)
        spelled += tokens[token_id]
        assert not other.released
    assert spelled.startswith(target)
    constraint.rollback(len(masks))
    if masks:
        again = np.full_like(masks[0], -1)
        constraint.fill(again, NO_IDS)
        assert (again == masks[0]).all()


@pytest.mark.parametrize("value", [None, "x", 7, "00" * 5000])
def test_bad_values_are_the_clients(value: object) -> None:
    with pytest.raises(InputError):
        compile_constraint(ConstraintSpec("healing", value), Vocabulary(4, lambda: [b"a"]))


TOKENS = [bytes([97 + n % 3]) * (1 + n % 4) + (b"" if n % 5 else b"xy") for n in range(VOCAB)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text("abc", max_size=5), st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=6),
    st.booleans(),
    st.integers(8, 40),
)
def test_in_the_engine_every_sample_spells_its_bytes(
    script: list[tuple[str, int, int]], overlap: bool, num_blocks: int
) -> None:
    """Batched, preempted, with samples, planned ahead: the bytes come first, and every token is one of its own."""
    core = make_core(num_blocks=max(num_blocks, 16), overlap=overlap, max_model_len=60)
    core.vocabulary = Vocabulary(VOCAB, lambda: TOKENS)
    driver, wanted = Driver(core), {}
    for text, num_samples, seed in script:
        constraints = (ConstraintSpec("healing", text.encode().hex()),) if text else ()
        key = driver.add(
            [1, 2, seed], num_samples=num_samples, sampling=Sampling(temperature=1, seed=seed), constraints=constraints,
            limits=Limits(20, stop_sets=()),
        )  # fmt: skip
        wanted |= {(key, sample): text.encode() for sample in range(num_samples)}
    driver.run()
    for place, target in wanted.items():
        tokens = driver.tokens[place]
        assert len(tokens) == 20 and b"".join(TOKENS[t] for t in tokens).startswith(target)
