"""Token ids → text as they arrive, and the stop strings in it. One Detokenizer a sample; knows no request.

The text is exact: joined, it is what decoding all ids at once gives, up to the stop string. It never depends on how the
ids were cut into deltas.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Mapping, Sequence

from tabstop.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StopStrings:
    """An automaton that finds the first of many strings to end in a stream of characters (Aho and Corasick, 1975).

    Immutable: samples share it and keep only a state number. State 0 is the start; a state's depth is how many of the
    last characters could be the beginning of a stop string. Building takes time and memory in proportion to their sum.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """`strings`: none of them empty."""
        assert all(strings)
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self._found: list[str | None] = [None]  # the longest stop string that ends in this state
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            following = self._next[state].get(character)
            if following is None:
                following = self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self._found.append(None)
            state = following
        self._found[state] = string

    def _link(self) -> None:
        """Breadth first, so that a state's shorter suffixes are linked before it."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, following in self._next[state].items():
                waiting.append(following)
                self._fail[following] = self._step(self._fail[state], character)
                self._found[following] = self._found[following] or self._found[self._fail[following]]

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def feed(self, state: int, text: str) -> tuple[int, int, str | None]:
        """(new state, characters read, stop string). Reads up to the end of the first stop string to be complete."""
        following = self._next
        for count, character in enumerate(text, 1):
            if state or character in following[0]:
                state = self._step(state, character)
                if self._found[state] is not None:
                    return state, count, self._found[state]
        return state, len(text), None


class Detokenizer:
    """Text state of one sample. Not thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: StopStrings | None = None,
        *,
        min_tokens: int = 0,
        keep_stop_string: bool = False,
        skip: int = 0,
    ) -> None:
        """Text of the first `min_tokens` tokens is not searched. `keep_stop_string`: it stays at the text's end.

        `skip`: bytes at the start that are not part of the text.
        """
        self._table = tokenizer.token_bytes
        self._decoder = _Utf8Decoder("replace")
        self._stop_strings = stop_strings
        self._min_tokens = min_tokens
        self._keep_stop_string = keep_stop_string
        self._skip = skip
        self._state = 0
        self._held = ""  # the last characters, if a stop string may begin with them
        self.control_bytes: Mapping[int, bytes] = {}
        """What control tokens add to the text, by id."""
        self.num_tokens = 0
        """Tokens read, the one that completed the stop string included, those after it not."""
        self.stop_string: str | None = None
        """The stop string that ended the text; feed nothing after it."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now: no half characters, nothing that may become a stop string."""
        assert self.stop_string is None
        if self._stop_strings is None:
            self.num_tokens += len(token_ids)
            return self._decoder.decode(b"".join(map(self._bytes, token_ids)))
        text = ""
        for token_id in token_ids:
            self.num_tokens += 1
            text += self._search(self._decoder.decode(self._bytes(token_id)))
            if self.stop_string is not None:
                break
        return text

    def finish(self) -> str:
        """The rest of the text, once no token follows; a half character shows as U+FFFD."""
        if self.stop_string is not None:
            return ""
        text = self._search(self._decoder.decode(b"", True))
        held, self._held = self._held, ""
        return text if self.stop_string is not None else text + held

    def count_skipped(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens that come next end within the bytes to skip."""
        left, count = self._skip, 0
        for token_id in token_ids if left else ():
            left -= len(self._spelled(token_id))
            if left < 0:
                break
            count += 1
            if not left:
                break
        return count

    def _spelled(self, token_id: int) -> bytes:
        spelled = self._table[token_id] if 0 <= token_id < len(self._table) else b""
        return spelled or self.control_bytes.get(token_id, b"")

    def _bytes(self, token_id: int) -> bytes:
        spelled = self._spelled(token_id)
        if not self._skip:
            return spelled
        skipped = min(self._skip, len(spelled))
        self._skip -= skipped
        return spelled[skipped:]

    def _search(self, text: str) -> str:
        """The part of held + text that is certain; the rest is held. Sets stop_string."""
        if self._stop_strings is None or self.num_tokens <= self._min_tokens:
            return text
        self._state, count, self.stop_string = self._stop_strings.feed(self._state, text)
        text = self._held + text[:count]
        keep = self._stop_strings.depth[self._state]
        if self.stop_string is not None:
            self._held = ""
            return text if self._keep_stop_string else text[: len(text) - len(self.stop_string)]
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
