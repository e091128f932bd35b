"""/tokenize and /detokenize, in vLLM's and llama.cpp's forms at once: pure functions over a tokenizer.

Both answers carry offsets: for each token the half-open range of characters that it covers in the text.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tabstop.api import Route
from tabstop.api.endpoints import of_model
from tabstop.api.fields import conversation
from tabstop.api.schema import Name, TokenId
from tabstop.errors import InputError
from tabstop.service import ServedModel
from tabstop.text import ModelText
from tabstop.text.chat import encode_chat
from tabstop.text.detokenizer import Detokenizer
from tabstop.text.messages import MessageBody
from tabstop.text.tokenizer import Encoding, Tokenizer

MAX_CHARACTERS = 512 << 10
"""Of one call: ids, offsets and pieces take hundreds of bytes of memory for each character."""


class TokenizeBody(msgspec.Struct, kw_only=True):
    """POST /tokenize: a `prompt` or `messages`, or llama.cpp's `content` with its own defaults."""

    model: Name | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[MessageBody] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
    chat_template_kwargs: Any = None
    reasoning_effort: Name | None = None
    content: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: Annotated[list[TokenId], Meta(max_length=512 << 10)]
    model: Name | None = None


def tokenize(body: TokenizeBody, model: ServedModel) -> dict[str, Any]:
    """{count, max_model_len, tokens, offsets}; `with_pieces` makes tokens llama.cpp's {id, piece} objects.

    Raises InputError. Slow for long texts: call it in a thread.
    """
    text, max_model_len = model.text, model.max_model_len
    encoding = _encode(body, text)
    tokens: list[Any] = encoding.ids
    if body.with_pieces:
        control = {token_id: name for name, token_id in text.tokenizer.control_tokens.items()}
        tokens = [
            {"id": token_id, "piece": control.get(token_id) or _piece(text.tokenizer, token_id)}
            for token_id in encoding.ids
        ]
    return {
        "count": len(tokens),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "offsets": encoding.offsets,
    }


def _encode(body: TokenizeBody, text: ModelText) -> Encoding:
    tokenizer = text.tokenizer
    if body.messages:
        asked = conversation(body)
        _check_length(sum(len(message["content"]) for message in asked.messages), "messages")
        ids = encode_chat(text.template, tokenizer, asked)
        return Encoding(ids, detokenize_offsets(tokenizer, ids)[1])
    source = body.content if body.content is not None else body.prompt
    if source is None:
        raise InputError("give `prompt`, `content` or `messages`", param="prompt")
    _check_length(len(source), "prompt" if body.content is None else "content")
    if body.content is not None:
        return tokenizer.encode_with_offsets(source, control=body.parse_special, bos=body.add_special)
    return tokenizer.encode_with_offsets(source, bos=body.add_special_tokens)


def _check_length(num_characters: int, param: str) -> None:
    if num_characters > MAX_CHARACTERS:
        raise InputError(
            f"`{param}` has {num_characters} characters; at most {MAX_CHARACTERS} are tokenized at once; send parts",
            param=param,
        )


def _piece(tokenizer: Tokenizer, token_id: int) -> str | list[int]:
    """The token's text, or its bytes when they are no text by themselves."""
    piece = tokenizer.bytes_of([token_id])
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def detokenize(body: DetokenizeBody, model: ServedModel) -> dict[str, Any]:
    """{prompt, content, offsets}: the text twice, under vLLM's name and llama.cpp's."""
    decoded, offsets = detokenize_offsets(model.text.tokenizer, body.tokens)
    return {"prompt": decoded, "content": decoded, "offsets": offsets}


def detokenize_offsets(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """Text and offsets of ids. A token that only begins a character covers nothing; the one that ends it, all of it."""
    decoder = Detokenizer(tokenizer)
    texts = [decoder.feed([token_id]) for token_id in ids]
    ends = list(accumulate(map(len, texts)))
    text = "".join(texts) + decoder.finish()
    if tokenizer.strips_space and text.startswith(" "):
        text, ends = text[1:], [max(0, end - 1) for end in ends]
    return text, list(zip([0, *ends], ends, strict=False))


ROUTES = (
    Route("POST", "/tokenize", "Text to token ids", of_model(tokenize), TokenizeBody),
    Route("POST", "/detokenize", "Token ids to text", of_model(detokenize), DetokenizeBody),
)
