"""Small checkpoints, tokenizer files only, with the special tokens and quirks of each family of code models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabstop.checkpoint import Checkpoint
from tabstop.text import gguf_vocabulary
from tests import tiny

BIGCODE = (
    *("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<filename>", "<gh_stars>"),
    "<reponame>",
)
QWEN = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
CODE = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>")

Spec = tuple[str, tuple[str, ...], dict[str, Any]]
"""Checkpoint name, special tokens, config.json."""

BYTE_LEVEL: dict[str, Spec] = {
    "qwen": ("m", QWEN, {"model_type": "qwen2"}),
    "codegemma": (
        "m",
        ("<eos>", "<bos>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"),
        {"model_type": "gemma"},
    ),
    "granite": (
        "m",
        ("<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
        {"model_type": "granite"},
    ),
    "starcoder": ("m", BIGCODE, {"model_type": "gpt_bigcode"}),
    "starcoder2": ("m", (*BIGCODE, "<file_sep>", "<repo_name>"), {"model_type": "starcoder2"}),
    "granite-code": ("granite-3b-code-base", BIGCODE, {"model_type": "llama"}),
    "stablecode": ("m", (*BIGCODE, "<file_sep>", "<repo_name>"), {"model_type": "stablelm"}),
    "mellum": ("m", BIGCODE, {"model_type": "llama"}),
    "santacoder": (
        "m",
        ("<|endoftext|>", "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"),
        {"model_type": "gpt2"},
    ),
    "deepseek": (
        "m",
        (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜fim▁begin｜>",
            "<｜fim▁hole｜>",
            "<｜fim▁end｜>",
            "<|EOT|>",
        ),
        {"model_type": "llama"},
    ),
    "seed-coder": (
        "m",
        ("<[end▁of▁sentence]>", "<[fim-prefix]>", "<[fim-middle]>", "<[fim-suffix]>", "<[PAD▁TOKEN]>"),
        {"model_type": "llama"},
    ),
    "codegeex": ("codegeex4-all-9b", CODE, {"model_type": "chatglm"}),
    "glm": ("m", CODE, {"model_type": "glm4"}),
    "falcon-h1": ("m", ("<|endoftext|>", "<|prefix|>", "<|suffix|>", "<|middle|>"), {"model_type": "falcon_h1"}),
}

BOS = {"deepseek": "<｜begin▁of▁sentence｜>", "codegemma": "<bos>"}


def byte_level_definition(special: tuple[str, ...], *, marked: bool = True) -> dict[str, Any]:
    """A byte-level tokenizer.json. `marked`: its added tokens are marked as special."""
    definition = tiny.tokenizer_json()
    first = 256 + len(tiny.MERGES)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": marked}
    definition["added_tokens"] = [{"id": first + n, "content": token, **flags} for n, token in enumerate(special)]
    vocabulary = {t: i for t, i in definition["model"]["vocab"].items() if i < first}
    definition["model"]["vocab"] = vocabulary | {token: first + n for n, token in enumerate(special)}
    return definition


def byte_level(folder: Path, family: str, *, marked: bool = True) -> Checkpoint:
    name, special, config = BYTE_LEVEL[family]
    settings = {"add_bos_token": family in BOS, "bos_token": BOS.get(family), "eos_token": special[0]}
    return write(folder, name, byte_level_definition(special, marked=marked), config, settings)


SENTENCEPIECE = {
    "codellama": ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
    "mistral": ("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
}


def sentencepiece(folder: Path, family: str, *, controls: bool = True) -> Checkpoint:
    """`controls`: the markers are control tokens; else ordinary pieces, as in CodeLlama's first conversions."""
    definition = sentencepiece_definition(SENTENCEPIECE[family], controls=controls)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return write(folder, "m", definition, {"model_type": "llama"}, settings)


def sentencepiece_definition(markers: tuple[str, ...], *, controls: bool = True) -> dict[str, Any]:
    """The tokenizer.json of a small SentencePiece vocabulary with bytes."""
    words = ["▁", "▁▁", "▁▁▁▁", "de", "def", "▁def", "re", "ret", "▁ret", "▁x", "x", "\n", "▁=", "☺", "▁☺"]
    letters = [chr(code) for code in range(33, 127) if chr(code) not in words]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    markers = tuple(marker for marker in markers if marker not in ("<unk>", "<s>", "</s>"))
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *words, *letters, *markers]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters)), *[3 if controls else 4] * len(markers)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(n) for n in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": True,
    }
    return gguf_vocabulary.tokenizer_json(metadata)


def any_family(folder: Path, family: str) -> Checkpoint:
    return (sentencepiece if family in SENTENCEPIECE else byte_level)(folder, family)


ALL = (*BYTE_LEVEL, *SENTENCEPIECE)


def write(
    folder: Path, name: str, definition: dict[str, Any], config: dict[str, Any], settings: dict[str, Any]
) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["X"]}), encoding="utf-8")
    return Checkpoint(name, folder=folder)
