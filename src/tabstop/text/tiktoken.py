"""tokenizer.model as a list of ranked tokens (tiktoken's form, GLM-4's) → the content of a tokenizer.json.

The file says neither how text is cut before its pieces are joined (GLM-4 cuts as Llama 3 does) nor which tokens are
special: those come from tokenizer_config.json.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from tabstop.text.gguf_vocabulary import PRE_TOKENIZERS
from tabstop.text.tekken import ranked_model

LINES = re.compile(rb"(?:[A-Za-z0-9+/]+={0,2} \d+\r?\n?)+")
"""A file of this form."""


def tokenizer_json(data: bytes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings`: tokenizer_config.json with added_tokens_decoder. `data` matches LINES."""
    ranked = [line.split() for line in data.splitlines()]
    tokens = [base64.b64decode(token) for token, _ in sorted(ranked, key=lambda entry: int(entry[1]))]
    added = {int(index): entry for index, entry in (settings.get("added_tokens_decoder") or {}).items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = ranked_model(tokens, 0)
    model["vocab"] |= {entry["content"]: index for index, entry in added.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": entry["content"], "special": bool(entry.get("special")), **flags}
            for index, entry in sorted(added.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS["chatglm-bpe"]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
