"""Strings ↔ token ids. Knows tokenizer.json (through the `tokenizers` package) and, by gguf_vocabulary, GGUF files.

Every encode goes through `encode_batch`, which releases the interpreter lock (`encode` does not): call these methods in
a thread. Text from users is *plain*: it never becomes a control token, whatever it spells; only templates and raw
prompts may spell control tokens. Does not know what tokens mean to a model (text/defaults.py, text/chat.py do).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers

from tabstop.checkpoint import Checkpoint
from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.text.byte_level import BYTES
from tabstop.text.folder_vocabulary import read_definition
from tabstop.text.gguf_vocabulary import SPACE, tokenizer_json

LOOKS_LIKE_CONTROL = re.compile(r"<[|｜].+[|｜]>|<\[?fim[-_].+\]?>", re.DOTALL)
"""Added tokens that some checkpoints forget to mark as special (Qwen's <|fim_prefix|>, for one)."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids and, for each, the half-open range of characters that it covers (empty for an added BOS)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Immutable after construction; every method may be called from any thread."""

    def __init__(
        self, definition: dict[str, Any], *, bos_token: str | None = None, add_bos: bool | None = None
    ) -> None:
        """`definition`: a tokenizer.json's content. `add_bos` None: what its post-processor does."""
        added = [
            token | {"special": token.get("special") or bool(LOOKS_LIKE_CONTROL.fullmatch(token["content"]))}
            for token in definition.get("added_tokens") or ()
        ]
        self._definition = definition | {"added_tokens": added}
        self._full = _build(self._definition)
        prefix = self._full.encode_batch([""], add_special_tokens=True)[0].ids
        if bos_token is None and prefix:
            bos_token = self._full.id_to_token(prefix[0])
        self.bos_id: int | None = self._full.token_to_id(bos_token) if bos_token else None
        """The token that opens a text, if the checkpoint names one."""
        self.add_bos: bool = self.bos_id is not None and (
            add_bos if add_bos is not None else prefix[:1] == [self.bos_id]
        )
        found = self._full.get_added_tokens_decoder()
        self.control_tokens: dict[str, int] = {token.content: i for i, token in found.items() if token.special}
        """Text → id of the tokens that only templates, raw prompts and the model itself may produce."""
        self.vocab_size: int = 1 + max(self._full.get_vocab(with_added_tokens=True).values(), default=-1)
        """Highest id + 1. A model may have more rows; their ids decode to nothing."""
        self._control = _control_pattern(found)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, blind to control tokens."""
        plain = _build(self._definition)
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _plain_inside(self) -> tokenizers.Tokenizer:
        """`_plain` for text that follows other text: some vocabularies put a blank before the very first word only."""
        pre = self._definition.get("pre_tokenizer") or {}
        if pre.get("type") != "Metaspace" or pre.get("prepend_scheme") != "first":
            return self._plain
        inside = _build(self._definition | {"pre_tokenizer": pre | {"prepend_scheme": "never"}})
        inside.encode_special_tokens = True
        return inside

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary."""
        found: int | None = self._full.token_to_id(token)
        return found

    def encode(self, text: str, *, control: bool = True, bos: bool = False) -> list[int]:
        """Ids of a text. `control`: spelled control tokens count as such. `bos`: opened as the model expects it."""
        tokenizer = self._full if control else self._plain
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self.with_bos(ids) if bos else ids

    def encode_with_offsets(self, text: str, *, control: bool = True, bos: bool = False) -> Encoding:
        """As encode, with each token's place in the text, in characters."""
        found = (self._full if control else self._plain).encode_batch([text], add_special_tokens=False)[0]
        opening = len(self.with_bos(found.ids)) - len(found.ids) if bos else 0
        return Encoding(self.with_bos(found.ids) if bos else found.ids, [(0, 0)] * opening + found.offsets)

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids with BOS in front where this model wants one; never a second one."""
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered template in which `mark` (one character) breaks control tokens spelled by users.

        The template's own control tokens become ids; the text between them is encoded apart, plain and unmarked.
        """
        if mark not in text:
            return self.encode(text)
        ids: list[int] = []
        end = 0
        for match in self._control.finditer(text):
            ids += self._encode_plain(text[end : match.start()].replace(mark, ""), first=end == 0)
            ids.append(self.control_tokens[match[0].strip() if match[0] not in self.control_tokens else match[0]])
            end = match.end()
        return ids + self._encode_plain(text[end:].replace(mark, ""), first=end == 0)

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        if not text:
            return []
        tokenizer = self._plain if first else self._plain_inside
        ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def mark_control(self, text: str, mark: str) -> str:
        """The text with `mark` inside everything that spells a control token, also across its two ends.

        Undone by encode_marked. A text that starts or ends with a piece of a control token is marked there too, so that
        what a template puts beside it cannot complete the token; one that is the middle of a control token, too.
        """
        text = self._control_starts.sub(lambda match: match[0] + mark, text)
        prefixes, suffixes = self._control_pieces
        lengths = range(1, self._max_control_length)
        if any(text[:length] in suffixes for length in lengths):
            text = mark + text
        if any(text[-length:] in prefixes for length in lengths) or self._is_middle(text):
            text += mark
        return text

    def _is_middle(self, text: str) -> bool:
        """Whether a control token has it inside: `<{{ name }}>` makes one of `|im_end|`."""
        return 0 < len(text) < self._max_control_length and text in self._control_middles

    @cached_property
    def _control_middles(self) -> str:
        return "\0".join(token[1:-1] for token in self.control_tokens)

    @cached_property
    def _control_starts(self) -> re.Pattern[str]:
        """The first character of every spelled control token, overlapping ones included."""
        rests: dict[str, set[str]] = {}
        for token in self.control_tokens:
            if len(token) > 1:
                rests.setdefault(token[0], set()).add(token[1:])
        return re.compile("|".join(f"{re.escape(c)}(?={_any_of(rest)})" for c, rest in rests.items()) or "(?!)")

    @cached_property
    def _control_pieces(self) -> tuple[frozenset[str], frozenset[str]]:
        """Every beginning and every end of a control token, whole tokens left out."""
        cuts = [(token[:at], token[at:]) for token in self.control_tokens for at in range(1, len(token))]
        return frozenset(left for left, _ in cuts), frozenset(right for _, right in cuts)

    @cached_property
    def _max_control_length(self) -> int:
        return max(map(len, self.control_tokens), default=0)

    @cached_property
    def _decodes_bytes(self) -> bool:
        """True: tokens spell bytes (byte-level); False: tokens spell text with ▁ and <0x..> (SentencePiece)."""
        kinds = set(_decoder_types(self._definition.get("decoder")))
        if "ByteLevel" in kinds:
            return True
        if kinds & {"ByteFallback", "Metaspace", "Replace"}:
            return False
        raise UnsupportedModelError(
            f"tokenizer.json decodes by {sorted(kinds) or 'nothing'}; supported are byte-level and SentencePiece "
            "vocabularies (ByteLevel, ByteFallback, Metaspace)"
        )

    @cached_property
    def strips_space(self) -> bool:
        """True when the blank that opens a text belongs to the spelling, not to the text."""
        return bool({"Strip", "Metaspace"} & set(_decoder_types(self._definition.get("decoder"))))

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, in UTF-8 (a token may hold part of a character); nothing for control tokens."""
        control = set(self.control_tokens.values())
        spell = _byte_level_bytes if self._decodes_bytes else _sentencepiece_bytes
        tokens = (None if i in control else self._full.id_to_token(i) for i in range(self.vocab_size))
        return [spell(token) if token else b"" for token in tokens]

    @cached_property
    def control_bytes(self) -> dict[int, bytes]:
        """Id → spelling of the tokens that add nothing to a text."""
        return {token_id: token.encode() for token, token_id in self.control_tokens.items()}

    def spellings_of(self, tokens: Iterable[str]) -> dict[int, bytes]:
        """Id → spelling of those that are control tokens of this vocabulary."""
        return {self.control_tokens[token]: token.encode() for token in tokens if token in self.control_tokens}

    def spelled(self, token_id: int) -> bytes:
        """What an id stands for when it is shown by itself: a control token by its name."""
        return self.bytes_of([token_id]) or self.control_bytes.get(token_id, b"")

    @cached_property
    def max_token_chars(self) -> int:
        """No text of n tokens is longer than n times that; a cheap bound before a text is encoded."""
        return max(1, max(map(len, self._full.get_vocab(with_added_tokens=True)), default=1))

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for, in the middle of a text; ids beyond the vocabulary add nothing."""
        table = self.token_bytes
        size = len(table)
        return b"".join([table[i] for i in ids if 0 <= i < size])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids from the start of a text; broken UTF-8 shows as U+FFFD; control tokens are left out."""
        text = self.bytes_of(ids).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text[:1] == " " else text


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises CheckpointError or UnsupportedModelError with what to do."""
    if checkpoint.gguf is not None:
        definition, settings = tokenizer_json(checkpoint.gguf_metadata), dict(checkpoint.tokenizer_config)
    else:
        definition, settings = read_definition(checkpoint)
    bos = settings.get("bos_token")
    tokenizer = Tokenizer(definition, bos_token=bos, add_bos=settings.get("add_bos_token"))
    _ = tokenizer.token_bytes  # unsupported decoders fail here, and the first request need not wait
    return tokenizer


def _build(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"the tokenizer cannot be loaded: {error}") from None
    built.no_padding()
    built.no_truncation()
    return built


def _any_of(texts: Collection[str]) -> str:
    """A regex for any of the texts, the longest that fits. Common beginnings are shared: a mismatch costs one step."""
    rests: dict[str, set[str]] = {}
    for text in texts:
        if text:
            rests.setdefault(text[0], set()).add(text[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in rests.items()]
    if len(branches) > 1 or (branches and "" in texts):
        return f"(?:{'|'.join(branches)}){'?' if '' in texts else ''}"
    return "".join(branches)


def _control_pattern(added: dict[int, tokenizers.AddedToken]) -> re.Pattern[str]:
    """Matches control tokens as the tokenizer does: with the blanks that lstrip and rstrip tokens swallow."""
    control = [token for token in added.values() if token.special]
    greedy = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in sorted(control, key=lambda token: len(token.content), reverse=True)
        if token.lstrip or token.rstrip
    ]
    plain = {token.content for token in control if not (token.lstrip or token.rstrip)}
    return re.compile("|".join([*greedy, *([_any_of(plain)] if plain else [])]) or "(?!)")


def _decoder_types(decoder: dict[str, Any] | None) -> list[str]:
    """The types of a tokenizer.json's decoder and of those inside it."""
    if not decoder:
        return []
    return [decoder["type"], *(kind for inner in decoder.get("decoders", ()) for kind in _decoder_types(inner))]


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTES[symbol] for symbol in token])
    except KeyError:  # an added token, spelled as it is
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    match = BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(SPACE, " ").encode()
