from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tabstop.text.shaping import Shape, Shaper, overlap_of


def shaped(shape: Shape, *pieces: str) -> tuple[str, bool]:
    shaper, text = Shaper(shape), ""
    for piece in pieces:
        text += shaper.feed(piece)
        if shaper.is_done:
            break
    return text, shaper.is_done


@given(st.lists(st.sampled_from(["a", "\n", "\r", "\r\n", "b\n"])))
def test_line_ends_do_not_depend_on_the_pieces(pieces: list[str]) -> None:
    whole = shaped(Shape(crlf=True), "".join(pieces))[0]
    assert shaped(Shape(crlf=True), *pieces)[0] == whole
    assert whole.count("\r\n") == whole.count("\n")


def test_a_dedented_line_ends_the_text() -> None:
    shape = Shape(min_indent=4)
    assert shaped(shape, "x\n", "    y\n  ", "  z\n", "  q") == ("x\n    y\n    z\n  ", True)
    assert shaped(shape, "x\n\ny") == ("x\n", True)
    assert shaped(shape, "x", "\n    y") == ("x\n    y", False)
    assert shaped(Shape(), "x\ny") == ("x\ny", False)


def test_time_ends_the_text_once_it_has_a_line_end() -> None:
    times = iter([0.0, 9.0, 9.5])
    shaper = Shaper(Shape(max_seconds=1.0), lambda: next(times))
    assert [(shaper.feed(piece), shaper.is_done) for piece in ("a", "b", "\nc")] == [
        ("a", False), ("b", False), ("\nc", True),
    ]  # fmt: skip


def test_overlaps_are_whole_lines_and_no_chance() -> None:
    assert overlap_of("\n    total = a + b\nprint(total)\n") == "\n    total = a + b\nprint(total)\n"
    assert overlap_of("\n    return compute(a)\nx") == "\n    return compute(a)\n"
    assert overlap_of(")\n") == overlap_of("") == overlap_of("\n\n  }\n") == ""
