from __future__ import annotations

import io
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.text.gguf_vocabulary import PRE_TOKENIZERS, tokenizer_json
from tabstop.text.tokenizer import Tokenizer
from tests import tiny
from tests.text.sources import code_lines

TRICKY = "I'm I'LL  x12345 +=  \t\n\n  foo_bar(naïve, 你好 )!?\r\n\r\n   中文123 e\u0301 ½ 😀   "


def byte_level(pre: str, **extra: Any) -> Tokenizer:
    """A vocabulary of bytes alone, so that ids show the bytes and pieces show the cuts."""
    tokens = [*tiny.byte_symbols(), "<|end|>", "<think>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 4],
        "tokenizer.ggml.merges": [],
        **extra,
    }
    return Tokenizer(tokenizer_json(metadata))


def pieces(pre: str, text: str) -> list[str]:
    """How the text is cut before BPE."""
    import json

    backend = Backend.from_str(json.dumps(byte_level(pre)._definition))
    return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_rule_cuts_without_loss(pre: str) -> None:
    tokenizer = byte_level(pre)
    for text in (TRICKY, "".join(code_lines(50))):
        assert "".join(pieces(pre, text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("starcoder", ["1", "2", "3", "4", "5"]),
        ("refact", ["1", "2", "3", "4", "5"]),
        ("deepseek-coder", ["1", "2", "3", "4", "5"]),
        ("seed-coder", ["1", "2", "3", "4", "5"]),
        ("tekken", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "45"]),
        ("deepseek-v3", ["123", "45"]),
        ("gpt-4o", ["123", "45"]),
        ("gpt-2", ["12345"]),
        ("deepseek-llm", ["12345"]),
        ("default", ["123", "45"]),
    ],
)
def test_families_cut_digits_their_way(pre: str, digits: list[str]) -> None:
    assert pieces(pre, "12345") == digits


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("qwen2", "a.b  c\n\n  d", ["a", ".b", " ", " c", "\n\n", " ", " d"]),
        ("gpt-2", "a.b  c\n\n  d", ["a", ".", "b", " ", " c", "\n\n ", " d"]),
        ("smollm", "x  1", ["x", "  ", "1"]),
        ("gpt-2", "x  1", ["x", " ", " 1"]),
        ("deepseek-coder", "if x:\n\ty", ["if", " x", ":", "\n", "\ty"]),
        ("tekken", "fooBar", ["foo", "Bar"]),
        ("qwen2", "it'S", ["it", "'S"]),
        ("gpt-2", "it'S", ["it", "'", "S"]),
    ],
)
def test_known_cuts(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


def test_qwen2_cuts_as_transformers_does() -> None:
    rule = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2").PRETOKENIZE_REGEX
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(rule), behavior="isolated")
    for text in [TRICKY, *code_lines(200)]:
        assert pieces("qwen2", text) == [piece for piece, _ in split.pre_tokenize_str(text)]


def test_token_types() -> None:
    tokenizer = byte_level("qwen2")
    assert tokenizer.control_tokens == {"<|end|>": 256}
    assert tokenizer.encode("a<|end|><think>b") == [97, 256, 257, 98]
    assert 257 in tokenizer.encode("<|end|><think>", control=False)  # user defined: text like any other
    assert 256 not in tokenizer.encode("<|end|><think>", control=False)
    assert tokenizer.decode([256, 257]) == "<think>"


def test_whole_pieces_beat_merges_where_the_family_says_so() -> None:
    tokens = [*tiny.byte_symbols(), "abc"]
    extra = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 257}
    assert byte_level("llama-bpe", **extra).encode("abc") == [256]
    assert byte_level("qwen2", **extra).encode("abc") == [97, 98, 99]


def test_unknown_kinds_say_what_to_do() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'martian'.*--tokenizer"):
        byte_level("martian")
    with pytest.raises(UnsupportedModelError, match=r"'rwkv'.*--tokenizer"):
        tokenizer_json({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a"]})
    with pytest.raises(CheckpointError, match="no vocabulary"):
        tokenizer_json({"tokenizer.ggml.model": "gpt2"})


@pytest.fixture(scope="module")
def sentencepiece_model() -> Any:
    """A small SentencePiece BPE model trained on code, as Llama's is made."""
    spm = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(line.rstrip("\n") for line in code_lines(3000, seed=2)),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(model: Any) -> dict[str, Any]:
    size = model.get_piece_size()

    def kind(index: int) -> int:
        if model.is_unknown(index):
            return 2
        return 3 if model.is_control(index) else 6 if model.is_byte(index) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in range(size)],
        "tokenizer.ggml.scores": [model.get_score(index) for index in range(size)],
        "tokenizer.ggml.token_type": [kind(index) for index in range(size)],
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def test_sentencepiece_ids_equal_sentencepiece(sentencepiece_model: Any) -> None:
    tokenizer = Tokenizer(tokenizer_json(sentencepiece_metadata(sentencepiece_model)), bos_token="<s>", add_bos=True)
    texts = [*code_lines(300, seed=3), "naïve 你好 😀\n", "  two  blanks", "\tx = 1\n\n"]
    different = [text for text in texts if tokenizer.encode(text) != sentencepiece_model.encode(text)]
    assert different == []
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        assert ids[0] == sentencepiece_model.bos_id()
        assert tokenizer.decode(ids) == text == sentencepiece_model.decode(ids)
    assert tokenizer.token_bytes[tokenizer.token_id("<0x0A>") or 0] == b"\n"
    assert sentencepiece_model.bos_id() not in tokenizer.encode("<s>", control=False)
