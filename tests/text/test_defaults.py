from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tabstop.checkpoint import Checkpoint
from tabstop.text import load_text
from tabstop.text.defaults import eos_token_ids, sampling_defaults, stop_sets
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tabstop.types import Sampling
from tests import tiny
from tests.api.serving import text_checkpoint


def with_generation_config(folder: Path, content: dict[str, Any]) -> Checkpoint:
    checkpoint = text_checkpoint(folder)
    (folder / "generation_config.json").write_text(json.dumps(content))
    return checkpoint


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20}, Sampling(0.7, 20, 0.8)),
        ({"temperature": 0, "top_k": 0, "top_p": 1}, Sampling(0.0)),
        ({"temperature": -1, "top_k": -1, "top_p": 7}, Sampling()),
        ({"temperature": "hot", "top_k": True, "top_p": None}, Sampling()),
    ],
)
def test_sampling_defaults(tmp_path: Path, config: dict[str, Any], expected: Sampling) -> None:
    assert sampling_defaults(with_generation_config(tmp_path, config)) == expected


def test_every_end_token_counts(tmp_path: Path) -> None:
    checkpoint = with_generation_config(tmp_path, {"eos_token_id": [tiny.ENDOFTEXT, 65]})
    (tmp_path / "config.json").write_text(json.dumps(tiny.llama_config(eos_token_id=66)))
    tokenizer = load_tokenizer(checkpoint)
    assert eos_token_ids(checkpoint, tokenizer) == (tiny.ENDOFTEXT, 65, 66, tiny.IM_END)


def test_stop_sets(tmp_path: Path) -> None:
    checkpoint = text_checkpoint(tmp_path)
    tokenizer = load_tokenizer(checkpoint)
    sets = stop_sets(checkpoint, tokenizer)
    assert sets["eos"] == {tiny.ENDOFTEXT, tiny.IM_END}
    newlines = {token_id for token_id in range(tiny.VOCAB_SIZE) if "\n" in tokenizer.decode([token_id])}
    assert sets["newline"] == newlines and 10 in newlines and len(newlines) >= 3


def test_stop_sets_of_the_default_model(default_checkpoint: Checkpoint, default_tokenizer: Tokenizer) -> None:
    sets = stop_sets(default_checkpoint, default_tokenizer)
    assert {0, 2} <= sets["eos"]
    assert all("\n" in default_tokenizer.decode([token_id]) for token_id in sets["newline"])
    assert set(default_tokenizer.encode("x\n  \n")) & sets["newline"]


def test_load_text(tmp_path: Path) -> None:
    text = load_text(text_checkpoint(tmp_path))
    assert text.template is not None and not text.tokenizer.add_bos
    other = text_checkpoint(tmp_path / "other")
    assert load_text(text_checkpoint(tmp_path), other).tokenizer.vocab_size == tiny.VOCAB_SIZE
