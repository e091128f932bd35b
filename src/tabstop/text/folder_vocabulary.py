"""Finds a checkpoint folder's vocabulary, in whichever form it lies there, as the content of a tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabstop.checkpoint import Checkpoint, read_json
from tabstop.errors import CheckpointError
from tabstop.text import sentencepiece, tekken, tiktoken


def read_definition(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """(content of a tokenizer.json, tokenizer_config.json): tokenizer.json, else tekken.json, else tokenizer.model.

    Raises CheckpointError or UnsupportedModelError.
    """
    folder, settings = checkpoint.folder, dict(checkpoint.tokenizer_config)
    assert folder is not None
    if (folder / "tokenizer.json").is_file():
        return _read(folder / "tokenizer.json"), settings
    if (folder / "tekken.json").is_file():
        return tekken.tokenizer_json(_read(folder / "tekken.json")), tekken.SETTINGS | settings
    for path in sorted(folder.glob("tokenizer.model*")):
        data, added = path.read_bytes(), read_json(folder / "added_tokens.json")
        if tiktoken.LINES.fullmatch(data):
            return tiktoken.tokenizer_json(data, settings), settings
        definition = sentencepiece.tokenizer_json(data, settings, added)
        return definition, {"bos_token": "<s>", "add_bos_token": True} | settings
    raise CheckpointError(
        f"{folder} has no tokenizer.json (nor tekken.json or tokenizer.model); save one there with transformers "
        "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) or give --tokenizer"
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
