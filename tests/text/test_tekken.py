"""tekken.json against a plain loop over ranks."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import CheckpointError
from tabstop.text.tekken import OLD_SPECIAL_TOKENS
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.broken import assert_incremental_equals_whole
from tests.text.sources import code_lines

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL, NUM_MERGES = 30, 200
TEXTS = ["", " ", "naïve Größe 🙂🙂 日本語", "\t\tif x:\r\n\r\n", "a" * 50, "</s>[PREFIX]", "\u0000\u200b"]


def pieces(text: str) -> list[list[bytes]]:
    return [[bytes([byte]) for byte in piece.encode()] for piece in regex.findall(PATTERN, text)]


def train(lines: list[str]) -> list[bytes]:
    """Tokens by rank: all bytes, then the most frequent unions."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [piece for line in lines for piece in pieces(line)]
    for _ in range(NUM_MERGES):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = pairs.most_common(1)[0]
        tokens.append(left + right)
        words = [join(word, left + right) for word in words]
    return tokens


def join(word: list[bytes], union: bytes) -> list[bytes]:
    """Joins every pair of neighbours that make the union, from the left."""
    joined: list[bytes] = []
    for part in word:
        if joined and joined[-1] + part == union:
            joined[-1] = union
        else:
            joined.append(part)
    return joined


def slow_encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """In each piece, the leftmost pair of the lowest rank is joined until none is left."""
    ids = []
    for word in pieces(text):
        while True:
            unions = [ranks.get(left + right, len(ranks)) for left, right in pairwise(word)]
            if not unions or min(unions) == len(ranks):
                break
            at = unions.index(min(unions))
            word[at : at + 2] = [word[at] + word[at + 1]]
        ids += [NUM_SPECIAL + ranks[part] for part in word]
    return ids


def tekken(tokens: list[bytes], **more: Any) -> dict[str, Any]:
    config = {"pattern": PATTERN, "default_num_special_tokens": NUM_SPECIAL}
    config["default_vocab_size"] = NUM_SPECIAL + len(tokens)
    unused = [b"beyond the vocabulary"]  # files hold more than is used
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens + unused)
    ]
    return {"config": config, "vocab": vocab} | more


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return train(code_lines(150))


@pytest.fixture(scope="module")
def tokenizer(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("tekken"), tekken(tokens))


def load(folder: Path, content: Any) -> Tokenizer:
    (folder / "params.json").write_text("{}")
    (folder / "tekken.json").write_text(json.dumps(content))
    return load_tokenizer(open_checkpoint(str(folder)))


def test_ids_are_those_of_the_plain_loop(tokens: list[bytes], tokenizer: Tokenizer) -> None:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in [*TEXTS, *code_lines(300, seed=1)]:
        ids = tokenizer.encode(text, control=False)
        assert ids == slow_encode(text, ranks), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == NUM_SPECIAL + len(tokens)


def test_special_tokens_of_old_and_new_files(tokens: list[bytes], tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.encode("[PREFIX]</s>") == [14, 2]
    assert tokenizer.token_id("<SPECIAL_29>") == 29 and len(tokenizer.control_tokens) == NUM_SPECIAL
    assert (tokenizer.bos_id, tokenizer.add_bos) == (OLD_SPECIAL_TOKENS.index("<s>"), True)
    named = [{"rank": 0, "token_str": "<unk>", "is_control": True}, {"rank": 1, "token_str": "<s>", "is_control": True}]
    new = load(tmp_path, tekken(tokens, special_tokens=[*named, {"rank": 7, "token_str": "[CURSOR]"}]))
    assert new.encode("[CURSOR]") == [7]
    assert new.encode("<SPECIAL_14>") == [14] and new.token_id("[PREFIX]") is None


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tekken\.json is damaged or of an unknown form: KeyError\('config'\)"):
        load(tmp_path, {"vocab": []})


def test_incremental_text_equals_the_whole_s(tokenizer: Tokenizer) -> None:
    assert_incremental_equals_whole(tokenizer)
