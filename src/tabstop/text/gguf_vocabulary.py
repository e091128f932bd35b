"""GGUF vocabulary → the content of a tokenizer.json. Knows GGUF's keys and pre-tokenizer names; loads nothing.

Two kinds exist in practice: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece BPE with scores and byte
fallback). How text is cut before BPE is only named in the file (`tokenizer.ggml.pre`); the rules behind the names are
those of the families' own tokenizer.json files, as far as they are public, else llama.cpp's (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabstop.errors import CheckpointError, UnsupportedModelError

CONTROL, USER_DEFINED = 3, 4
"""tokenizer.ggml.token_type: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""

SPACE = "▁"  # SentencePiece's spelling of a blank

Json = dict[str, Any]


def _split(regex: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits(*regexes: str) -> list[Json]:
    """Each regex cuts the pieces that the one before it left; matches and the text between them stay apart."""
    return [*map(_split, regexes), _byte_level(use_regex=False)]


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_LLAMA3 = _splits(
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES,
)
_QWEN2 = _splits(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES)
_GPT2 = [_byte_level(use_regex=True)]
_STARCODER = [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = _splits(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_GPT4O = _splits(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_DEEPSEEK_LLM = _splits(
    r"[\r\n]",
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_DEEPSEEK_V3 = _splits(
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)

PRE_TOKENIZERS: dict[str, list[Json]] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe", "falcon3", "pixtral", "chatglm-bpe", "glm4"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2", "mellum"), _GPT2),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell", "command-r", "exaone"), _STARCODER),
    "deepseek-coder": _splits(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-v3": _DEEPSEEK_V3,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "seed-coder": _splits(
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES,
    ),
    "default": _splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""tokenizer.ggml.pre → tokenizer.json pre-tokenizers, applied in order."""

IGNORE_MERGES = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"))
"""Pre-tokenizers whose pieces become one token when the vocabulary has them whole, whatever the merges say."""


def tokenizer_json(metadata: Mapping[str, Any]) -> Json:
    """The content of a tokenizer.json with the ids of the GGUF file.

    Raises CheckpointError for missing keys and UnsupportedModelError for a vocabulary kind that is not known.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CheckpointError("the GGUF file holds no vocabulary (tokenizer.ggml.tokens); give --tokenizer")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        parts = _byte_level_parts(metadata, tokens)
    elif kind == "llama":
        parts = _sentencepiece_parts(metadata, tokens)
    else:
        raise UnsupportedModelError(
            f"the GGUF file's vocabulary is of kind {kind!r}; known are gpt2 and llama; give --tokenizer (a folder or "
            "Hub id with tokenizer.json)"
        )
    return {"version": "1.0", "truncation": None, "padding": None, "post_processor": None} | parts


def _byte_level_parts(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"the GGUF file cuts text by the rules named {pre!r} (tokenizer.ggml.pre), which are not known; known are "
            f"{', '.join(PRE_TOKENIZERS)}; give --tokenizer (a folder or Hub id with tokenizer.json)"
        )
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges", ())]
    return {
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "decoder": _byte_level(use_regex=True),
        "model": _bpe(tokens, merges, ignore_merges=pre in IGNORE_MERGES),
    }


def _sentencepiece_parts(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Json:
    prefix = [{"type": "Prepend", "prepend": SPACE}] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    merges = metadata.get("tokenizer.ggml.merges")
    return {
        "added_tokens": _added_tokens(metadata, tokens),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(
            tokens,
            [merge.split(" ", 1) for merge in merges] if merges else _merges_from_scores(metadata, tokens),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _bpe(tokens: Sequence[str], merges: list[list[str]], **options: Any) -> Json:
    # A padded vocabulary may repeat a text: its first id counts.
    vocabulary = {token: index for index, token in reversed(list(enumerate(tokens)))}
    defaults = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {"type": "BPE"} | defaults | options | {"vocab": vocabulary, "merges": merges}


def _added_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[Json]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, "special": kind == CONTROL, **flags}
        for index, (token, kind) in enumerate(zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False))
        if kind in (CONTROL, USER_DEFINED) and token
    ]


def _merges_from_scores(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[list[str]]:
    """SentencePiece BPE joins the pair whose union scores best; as ranked merges: every cut of every token, best first.

    Tokens that text cannot reach (control, byte, …) are no unions.
    """
    scores = metadata.get("tokenizer.ggml.scores") or [-float(index) for index in range(len(tokens))]
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] == 1}
    merges: list[list[str]] = []
    for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token])):
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids]
        merges += [[left, right] for _, _, left, right in sorted(known)]
    return merges
