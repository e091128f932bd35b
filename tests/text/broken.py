"""Random ids, which spell broken UTF-8 most of the time."""

from __future__ import annotations

import random

from tabstop.text.detokenizer import Detokenizer
from tabstop.text.tokenizer import Tokenizer


def assert_incremental_equals_whole(tokenizer: Tokenizer, num_texts: int = 300) -> None:
    """Whatever the ids and however they are cut into deltas."""
    rng = random.Random(0)
    num_broken = 0
    for _ in range(num_texts):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(40))]
        detokenizer, text, start = Detokenizer(tokenizer), "", 0
        while start < len(ids):
            end = start + rng.randrange(1, 5)
            text += detokenizer.feed(ids[start:end])
            start = end
        text += detokenizer.finish()
        assert text == tokenizer.bytes_of(ids).decode("utf-8", "replace")
        assert text.removeprefix(" " if tokenizer.strips_space else "") == tokenizer.decode(ids)
        num_broken += "\ufffd" in text
    assert num_broken > num_texts // 10
