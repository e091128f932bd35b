"""Events survive any cut of the byte stream."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tabstop.bench.sse import EventParser

STREAM = (
    b": ping\n\n"
    b'event: message\r\ndata: {"text": "\xc3\xa9"}\r\n\r\n'
    b"data:no space\r\r"
    b"data: one\ndata: two\n\n"
    b"id: 7\nretry: 5\ndatabase: not a field\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"text": "\xc3\xa9"}', b"no space", b"one\ntwo", b"[DONE]"]


def parse(pieces: list[bytes]) -> list[bytes]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_all_line_ends_comments_and_several_data_lines() -> None:
    assert parse([STREAM]) == EVENTS


def test_one_byte_at_a_time() -> None:
    assert parse([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut(positions: list[int]) -> None:
    edges = [0, *sorted(positions), len(STREAM)]
    assert parse([STREAM[a:b] for a, b in pairwise(edges)]) == EVENTS


def test_an_unfinished_event_is_noticed() -> None:
    parser = EventParser()
    assert list(parser.feed(b"data: {")) == [] and parser.has_tail
    assert list(parser.feed(b"}\n\n")) == [b"{}"] and not parser.has_tail
