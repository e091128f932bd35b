"""tokenizer.model (SentencePiece) → the content of a tokenizer.json, for folders that have no such file.

The file is one protocol buffer; the few fields that matter are read here. Only BPE models with their texts unchanged
are known (Llama's, Mistral's, Gemma's). Tokens that were added later come from the folder's JSON files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.text import gguf_vocabulary

Json = dict[str, Any]
Message = dict[int, Any]
"""Field number → value: an int or bytes, of a repeated field the last."""

BPE = 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def tokenizer_json(data: bytes, settings: Mapping[str, Any], added: Mapping[str, int]) -> Json:
    """`settings`: tokenizer_config.json (legacy, added_tokens_decoder); `added`: added_tokens.json.

    Raises CheckpointError for a damaged file, UnsupportedModelError for another kind of model.
    """
    try:
        fields = list(_fields(data))
        pieces = [_message(value) for field, value in fields if field == 1]
        model = dict(fields)
        metadata = _metadata(pieces, _message(model.get(2, b"")), _message(model.get(3, b"")))
    except (ValueError, KeyError, IndexError, struct.error, UnicodeDecodeError, AttributeError):
        raise CheckpointError(
            "tokenizer.model is damaged or no SentencePiece model; save a tokenizer.json beside it with transformers"
        ) from None
    _add_tokens(metadata, settings, added)
    definition = gguf_vocabulary.tokenizer_json(metadata)
    if settings.get("legacy") is False and metadata["tokenizer.ggml.add_space_prefix"]:
        scheme = {"type": "Metaspace", "replacement": gguf_vocabulary.SPACE, "prepend_scheme": "first", "split": False}
        definition |= {"normalizer": None, "pre_tokenizer": scheme}
    return definition


def _metadata(pieces: list[Message], trainer: Message, normalizer: Message) -> Json:
    """The vocabulary as GGUF files write it, which borrowed its numbers from this one."""
    if not pieces:
        raise ValueError("no pieces")
    if trainer.get(3, 1) != BPE:
        raise UnsupportedModelError("tokenizer.model is no BPE model; save a tokenizer.json beside it")
    if normalizer.get(2):
        raise UnsupportedModelError(
            "tokenizer.model rewrites texts before it cuts them; save a tokenizer.json beside it"
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece[1].decode() for piece in pieces],
        "tokenizer.ggml.scores": [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces],
        "tokenizer.ggml.token_type": [piece.get(3, 1) for piece in pieces],
        "tokenizer.ggml.unknown_token_id": trainer.get(40, 0),
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
    }


def _add_tokens(metadata: Json, settings: Mapping[str, Any], added: Mapping[str, int]) -> None:
    """Appends the tokens behind the model's, and marks those of its own that are special."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    given = {index: {"content": token, "special": False} for token, index in added.items()}
    given |= {int(index): entry for index, entry in (settings.get("added_tokens_decoder") or {}).items()}
    for index in sorted(given):
        for unused in range(len(tokens), index + 1):
            tokens.append(f"[unused{unused}]")
            kinds.append(5)
            metadata["tokenizer.ggml.scores"].append(0.0)
        special = given[index].get("special", False)
        kind = gguf_vocabulary.CONTROL if special else gguf_vocabulary.USER_DEFINED
        tokens[index], kinds[index] = given[index]["content"], kind


def _message(data: bytes) -> Message:
    return dict(_fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """All fields of a message in their order; of a repeated one all values. Raises ValueError or IndexError."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(kind, -1)
        if kind == BYTES:
            size, position = _varint(data, position)
        if size < 0 or position + size > len(data):
            raise ValueError("a field beyond the end")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(number, next position): seven bits a byte, lowest first, until a byte below 128."""
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
