"""Every family's layout read back: whatever the texts are, exactly they stand between the markers, and no other one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop.text.fim import FillIn, Hole, load_fill_in
from tabstop.text.fim_frames import SourceFile, Surroundings
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.fim_vocabularies import ALL, BIGCODE, any_family, byte_level_definition, write
from tests.text.test_fim import BUDGET, lay_out, spelled

SPELLINGS = (
    *(
        "<|fim_prefix|>",
        "<fim_suffix>",
        "<fim-middle>",
        "<｜fim▁hole｜>",
        " <SUF>",
        "▁<MID>",
        "[PREFIX]",
        "<|file_sep|>",
    ),
    *("<[fim-middle]>", "<|code_prefix|>", "</s>", "<|endoftext|>", "<filename>", "<reponame>", "<0x41>", "☺"),
)
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12),
        st.text(" \t\nd(ef:x)é", max_size=12),
        st.sampled_from(SPELLINGS),
    ),
    max_size=4,
).map("".join)


@cache
def loaded(family: str) -> tuple[Tokenizer, FillIn]:
    checkpoint = any_family(Path(mkdtemp()), family)
    tokenizer = load_tokenizer(checkpoint)
    return tokenizer, load_fill_in(checkpoint, tokenizer)


ORDERS = [(family, order) for family in ALL for order in loaded(family)[1].family.orders]  # type: ignore[union-attr]


@pytest.mark.parametrize(("family", "order"), ORDERS)
@settings(max_examples=40, deadline=None)
@given(prefix=TEXTS, suffix=TEXTS, name=TEXTS)
def test_what_is_between_the_markers_is_what_was_sent(
    family: str, order: str, prefix: str, suffix: str, name: str
) -> None:
    """Bytes, as a model of this vocabulary would write them; the files around change nothing there."""
    tokenizer, fill = loaded(family)
    assert fill.family is not None
    if tokenizer.strips_space:  # to sentencepiece it is a blank
        prefix, suffix = prefix.replace("▁", " "), suffix.replace("▁", " ")
    around = Surroundings((SourceFile(name, name),), repo_name=name, path=name, language=name) if name else None
    for hole in (Hole(prefix, suffix, order=order), Hole(prefix, suffix, around or Surroundings(), order)):
        ids = fill.encode(hole, BUDGET).ids
        texts = between(tokenizer, fill, order, ids)
        assert texts["S"] == (suffix or fill.family.empty_suffix).encode()
        is_framed = hole.around and family != "qwen"
        assert texts["P"].endswith(prefix.encode()) if is_framed else texts["P"] == prefix.encode()


def between(tokenizer: Tokenizer, fill: FillIn, order: str, ids: list[int]) -> dict[str, bytes]:
    """The bytes of P and S. Fails where a marker is missing, twice, or out of its place."""
    assert fill.family is not None
    parts = fill.family.orders[order]
    markers = [tokenizer.token_id(fill.family.marker(part)) for part in parts if part not in ("P", "S")]
    places = [at for at, token_id in enumerate(ids) if token_id in fill.layout_ids]
    assert [ids[at] for at in places] == markers
    bounds = [*places, after_layout(tokenizer, ids, places[-1])]
    found, number = {}, -1
    for part in parts:
        if part in ("P", "S"):
            found[part] = text_of(tokenizer, ids[bounds[number] + 1 : bounds[number + 1]], is_first=part == "P")
        else:
            number += 1
    return found


def after_layout(tokenizer: Tokenizer, ids: list[int], last: int) -> int:
    """Where the layout ends: before a chat's closing tokens."""
    assistant = tokenizer.token_id("<|assistant|>")
    return ids.index(assistant, last) if assistant in ids[last:] else len(ids)


def text_of(tokenizer: Tokenizer, ids: list[int], *, is_first: bool) -> bytes:
    """The blank that a sentencepiece vocabulary puts before a text is no part of it; markers inside (tags) are none."""
    spelled = tokenizer.bytes_of(ids)
    return spelled.removeprefix(b" ") if is_first and tokenizer.strips_space else spelled


# ---- tags of a repository


@pytest.mark.parametrize(
    ("around", "order", "expected"),
    [
        (
            Surroundings(repo_name="tabs", path="c.py"),
            "psm",
            "<fim_prefix><reponame>tabs<filename>c.py\nP<fim_suffix>S",
        ),
        (Surroundings(path="c.py"), "psm", "<fim_prefix><filename>c.py\nP<fim_suffix>S<fim_middle>"),
        (Surroundings(repo_name="tabs"), "psm", "<fim_prefix><reponame>tabs\nP<fim_suffix>S<fim_middle>"),
        (Surroundings(repo_name="tabs", path="c"), "spm", "<fim_suffix>S<fim_middle><reponame>tabs<filename>c\nP"),
        (Surroundings(language="python"), "psm", "<fim_prefix>P<fim_suffix>S<fim_middle>"),
    ],
)
def test_starcoders_tags_are_inside_the_prefix(around: Surroundings, order: str, expected: str, tmp_path: Path) -> None:
    """They opened the documents that were cut into holes."""
    assert expected in lay_out(tmp_path, "starcoder", Hole("P", "S", around, order))


def test_a_tag_that_a_vocabulary_lacks_leaves_no_name_behind(tmp_path: Path) -> None:
    """CodeQwen spells StarCoder2's first tag otherwise; others have none."""
    around = Surroundings((SourceFile("a.py", "A"),), repo_name="tabs", path="c.py")
    for number, (special, opening) in enumerate(
        [
            ((*BIGCODE, "<file_sep>"), "<reponame>tabs<file_sep>a.py\nA"),
            ((*(name for name in BIGCODE if name != "<reponame>"), "<file_sep>"), "<file_sep>a.py\nA"),
        ]
    ):
        definition = byte_level_definition(special)
        checkpoint = write(tmp_path / str(number), "codeqwen", definition, {"model_type": "qwen2"}, {})
        tokenizer = load_tokenizer(checkpoint)
        fill = load_fill_in(checkpoint, tokenizer)
        text = spelled(tokenizer, fill.encode(Hole("P", "S", around), BUDGET).ids)
        assert fill.name == "starcoder2" and text.startswith(opening)
    definition = byte_level_definition(tuple(name for name in BIGCODE if name not in ("<reponame>", "<filename>")))
    checkpoint = write(tmp_path / "bare", "m", definition, {"model_type": "gpt_bigcode"}, {})
    tokenizer = load_tokenizer(checkpoint)
    ids = load_fill_in(checkpoint, tokenizer).encode(Hole("P", "S", around), BUDGET).ids
    assert spelled(tokenizer, ids) == "<fim_prefix>#a.py\nA\nP<fim_suffix>S<fim_middle>"
