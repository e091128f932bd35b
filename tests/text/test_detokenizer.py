from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tabstop.text.detokenizer import Detokenizer, StopStrings
from tabstop.text.tokenizer import Tokenizer
from tests import tiny

TINY = Tokenizer(tiny.tokenizer_json())
IDS = st.lists(st.integers(0, tiny.VOCAB_SIZE + 2), max_size=60)
LETTERS = st.text(alphabet="ab\né😀", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\né", min_size=1, max_size=5), max_size=6)


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """The ids as deltas of the given lengths."""
    deltas = []
    for length in cuts:
        deltas.append(ids[:length])
        ids = ids[length:]
    return [*deltas, ids]


def run(detokenizer: Detokenizer, deltas: list[list[int]]) -> str:
    text = ""
    for delta in deltas:
        text += detokenizer.feed(delta)
        if detokenizer.stop_string is not None:
            return text
    return text + detokenizer.finish()


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The slow twin: reads character by character, and stops where the first stop string is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(IDS, st.lists(st.integers(0, 5), max_size=30))
@settings(max_examples=300)
@example([0xF0, 0x9F, 0x98], [1, 1])
@example([0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xC3], [1, 1, 1])
def test_incremental_equals_whole(ids: list[int], cuts: list[int]) -> None:
    detokenizer = Detokenizer(TINY)
    assert run(detokenizer, cut(ids, cuts)) == TINY.decode(ids)
    assert detokenizer.num_tokens == len(ids)


def test_whole_vocabulary_of_the_default_model(default_tokenizer: Tokenizer, default_oracle) -> None:
    @given(st.lists(st.integers(0, default_tokenizer.vocab_size - 1), min_size=1, max_size=200), st.integers(1, 7))
    @settings(max_examples=200, deadline=None)
    def check(ids: list[int], length: int) -> None:
        deltas = [ids[start : start + length] for start in range(0, len(ids), length)]
        whole = default_oracle.backend_tokenizer.decode(ids, skip_special_tokens=True)
        assert run(Detokenizer(default_tokenizer), deltas) == whole == default_tokenizer.decode(ids)

    check()
    ids = list(range(default_tokenizer.vocab_size))
    whole = default_oracle.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert run(Detokenizer(default_tokenizer), [[token_id] for token_id in ids]) == whole


def test_half_characters_wait() -> None:
    detokenizer = Detokenizer(TINY)
    assert [detokenizer.feed([byte]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert detokenizer.feed([0xF0]) == ""
    assert detokenizer.finish() == "\ufffd"


@given(LETTERS, STOPS, st.lists(st.integers(0, 4), max_size=20))
@settings(max_examples=500)
@example("aab", ["ab", "b"], [])
@example("abab", ["abb", "ba"], [1, 1, 1])
def test_stop_strings_end_the_text_whatever_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    ids = list(text.encode())  # ids 0 to 255 are bytes: every border falls between tokens
    detokenizer = Detokenizer(TINY, StopStrings(stops))
    assert (run(detokenizer, cut(ids, cuts)), detokenizer.stop_string) == first_stop(text, stops)
    kept = Detokenizer(TINY, StopStrings(stops), keep_stop_string=True)
    expected, stop = first_stop(text, stops)
    assert run(kept, cut(ids, cuts)) == expected + (stop or "")


@given(IDS, STOPS)
def test_stop_strings_in_any_ids(ids: list[int], stops: list[str]) -> None:
    detokenizer = Detokenizer(TINY, StopStrings(stops))
    assert (run(detokenizer, [[i] for i in ids]), detokenizer.stop_string) == first_stop(TINY.decode(ids), stops)


def test_text_that_may_become_a_stop_string_waits() -> None:
    detokenizer = Detokenizer(TINY, StopStrings(["</s>", "<b>"]))
    assert [detokenizer.feed([ord(c)]) for c in "a<"] == ["a", ""]
    assert detokenizer.feed([ord("/")]) == ""
    assert detokenizer.feed([ord("<")]) == "</"  # the first one cannot come any more, a new one may
    assert detokenizer.finish() == "<"


def test_tokens_are_counted_to_the_one_that_completes_the_stop_string() -> None:
    ids = TINY.encode("x = 1\n\n    return")  # the token "\n\n" holds the end of one and more
    detokenizer = Detokenizer(TINY, StopStrings(["1\n"]))
    assert detokenizer.feed(ids) == "x = "
    assert detokenizer.stop_string == "1\n"
    assert 0 < detokenizer.num_tokens < len(ids)
    assert TINY.decode(ids[: detokenizer.num_tokens]).startswith("x = 1\n")


def test_stop_strings_wait_for_min_tokens() -> None:
    detokenizer = Detokenizer(TINY, StopStrings(["aa"]), min_tokens=3)
    assert detokenizer.feed([97] * 4) == "aaa"  # the fourth may begin a stop string
    assert detokenizer.feed([97]) == ""
    assert detokenizer.stop_string == "aa"
    assert detokenizer.num_tokens == 5


def test_sixty_four_strings() -> None:
    stops = [f"<stop {number}>" for number in range(64)]
    detokenizer = Detokenizer(TINY, StopStrings(stops))
    text = "x <stop 6 <stop 63 <stop 64><stop 17>"
    assert run(detokenizer, [[byte] for byte in text.encode()]) == "x <stop 6 <stop 63 <stop 64>"
    assert detokenizer.stop_string == "<stop 17>"
