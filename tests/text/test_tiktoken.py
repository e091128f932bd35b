"""Ranked tokens (tiktoken's form) against a plain loop over ranks."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tabstop.checkpoint import open_checkpoint
from tabstop.text.tokenizer import load_tokenizer
from tests import tiny
from tests.text import test_tekken
from tests.text.broken import assert_incremental_equals_whole
from tests.text.sources import code_lines

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_ids_are_those_of_the_plain_loop(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(test_tekken, "PATTERN", LLAMA3)
    monkeypatch.setattr(test_tekken, "NUM_SPECIAL", 0)
    tokens = test_tekken.train(code_lines(100))
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "config.json").write_text(json.dumps(tiny.llama_config()))
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    size = len(tokens)
    added = {str(size): {"content": "<|user|>", "special": True}, str(size + 1): {"content": "<|code_middle|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(open_checkpoint(str(tmp_path)))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for text in [*test_tekken.TEXTS, *code_lines(200, seed=1)]:
        ids = tokenizer.encode(text, control=False)
        assert ids == test_tekken.slow_encode(text, ranks), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|user|><|code_middle|>") == [size, size + 1]
    assert not tokenizer.add_bos
    assert_incremental_equals_whole(tokenizer)
