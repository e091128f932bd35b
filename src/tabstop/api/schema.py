"""The bodies that clients send, as msgspec structs: every integer bounded, unknown keys tolerated.

Has what all that generate share; the rest is each dialect's. Knows forms, not meanings: fields.py and the dialects turn
bodies into calls. Parameters of OpenAI and its relatives that this server does not have are declared too, so that using
one is refused by name instead of silently ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from tabstop.errors import InputError
from tabstop.types import MAX_LOGPROBS

Body = TypeVar("Body", bound=msgspec.Struct)

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, Meta(max_length=1024)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=100)]
Bias = Annotated[float, Meta(ge=-100, le=100)] | bool  # false bans
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Prompts = str | list[str | TokenId | list[TokenId]]  # a text, texts, ids, or lists of ids


class StreamOptions(msgspec.Struct):
    """include_usage: one more event with the token counts."""

    include_usage: bool | None = None


class CacheOptions(msgspec.Struct):
    """What the prefix cache may do for this request."""

    read: bool = True
    write: bool = True
    retain: bool = True


class Refused(msgspec.Struct, kw_only=True):
    """Parameters that change an answer and that this server does not have: refused unless they ask for nothing."""

    length_penalty: Any = None
    use_beam_search: Any = None
    prompt_embeds: Any = None
    guided_whitespace_pattern: Any = None


class Constrained(Refused, kw_only=True):
    """What the text may be, in the words of OpenAI, vLLM, llama.cpp and SGLang; read by constraints.py."""

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    json_schema: Any = None
    regex: Any = None
    grammar: Any = None
    ebnf: Any = None


class Generation(Constrained, kw_only=True):
    """What completions, chats and holes share. null always means: not given."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Seed | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | list[tuple[TokenId | str, Bias]] | None = None  # pairs: llama.cpp's
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=512 << 10)] | None = None
    bad_words: Annotated[list[Name], Meta(max_length=256)] | None = None
    logprobs: bool | NumLogprobs | None = None
    top_logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    user: Name | None = None
    # ours: scheduling and caching
    priority: str | None = None  # interactive, normal or background
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    timeout: Annotated[float, Meta(gt=0, le=2_000_000)] | None = None  # seconds; another spelling of deadline_ms
    session: Name | None = None
    prompt_cache_key: Name | None = None
    cache: CacheOptions | None = None
    cache_prompt: bool | None = None
    cache_salt: Name | None = None
    best_of: Annotated[int, Meta(ge=1, le=1024)] | None = None


class FileBody(msgspec.Struct, kw_only=True):
    """Another file of the repository, or a part of one. llama.cpp calls the path `filename`."""

    path: Name | None = None
    filename: Name | None = None
    text: str


class AroundHole(Generation, kw_only=True):
    """What is known around a hole beside its own file: ours, on every path that fills holes."""

    files: Annotated[list[FileBody], Meta(max_length=1024)] | None = None
    repo_name: Name | None = None
    path: Name | None = None
    language: Name | None = None
    fim_order: Literal["psm", "spm"] | None = None
    token_healing: bool | None = None
    distinct: bool | None = None
    confidence: bool | None = None
    min_confidence: Annotated[float, Meta(ge=-1000, le=0)] | None = None


def _choices(kind: type[msgspec.Struct], name: str | None) -> str:
    """The texts that a field of a body may be, where its type lists them."""
    kinds = get_args(get_type_hints(kind)[name or ""])
    return " or ".join(str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))


def _why_no_json(body: bytes, error: msgspec.DecodeError) -> str:
    reason = str(error)
    if not body.strip():
        return "the body is empty; send a JSON object"
    if reason == "Input data was truncated":
        is_half = re.search(rb"\\u[dD][89abAB][0-9a-fA-F]{2}.{0,5}\Z", body, re.DOTALL)  # the other half has six bytes
        reason = "it ends with half of an escaped surrogate pair" if is_half else "it ends too early"
    return f"the body is not valid JSON: {reason}"


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """The struct of a JSON body. Raises InputError naming the parameter."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        missing = re.search(r"missing required field `(\w+)`", message)
        param = re.split(r"[.\[]", path.strip("`."))[0] or (missing and missing[1]) or None
        if message.startswith("Invalid enum value"):  # quotes it
            message = f"it must be {_choices(kind, param)}"
        place = f"{path.strip('`.')}: " if path else ""
        raise InputError(f"{place}{message[:1].lower()}{message[1:]}", param=param) from None
    except msgspec.DecodeError as error:
        raise InputError(_why_no_json(body, error)) from None
    except (UnicodeDecodeError, RecursionError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "it is nested too deeply"
        raise InputError(f"the body is not valid JSON: {reason}") from None
