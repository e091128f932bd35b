"""The wire forms of the endpoints: a turn → request body, an event (or a whole answer) → text, token counts, usage.

One class a dialect, two pure directions; no sockets, no clocks. Unknown fields of an answer are ignored: servers of any
age can be measured.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from tabstop.bench.records import Turn
from tabstop.errors import ConfigError, InputError

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # all that msgspec raises for bad JSON


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one event of a stream says."""

    text: str = ""
    num_tokens: int | None = None  # tokens in this event, if the server says
    total_tokens: int | None = None  # completion tokens so far, if the server says
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None  # final
    error: str = ""
    is_end: bool = False  # nothing may follow


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """What all requests of a run share."""

    model: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stream: bool = True  # False: the whole answer in one body
    running_usage: bool = True  # ask for the token count in each chunk (where the dialect has that)
    extra: dict[str, Any] = {}  # further body fields; they win


class Dialect(Protocol):
    """How one kind of endpoint is spoken to."""

    name: str
    path: str
    takes_ids: bool  # as a prompt

    def body(self, turn: Turn, sampling: Sampling) -> dict[str, Any]: ...

    def path_of(self, turn: Turn, sampling: Sampling) -> str: ...

    def parse(self, data: bytes) -> Event:
        """One event's data (never [DONE]). Raises msgspec.DecodeError for anything else."""
        ...

    def parse_whole(self, body: bytes) -> Event:
        """An answer that did not stream. Raises like parse()."""
        ...


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None  # of a whole chat answer
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _OpenAIChunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class OpenAI:
    """Common half of the two OpenAI forms. Usage in a chunk beside choices counts so far; beside none it is final."""

    takes_ids = False
    path = ""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_OpenAIChunk).decode

    def path_of(self, turn: Turn, sampling: Sampling) -> str:
        return self.path

    def parse(self, data: bytes) -> Event:
        chunk = self._decode(data)
        if chunk.error is not None:
            return Event(error=error_text(chunk.error), is_end=True)
        usage, choice = chunk.usage, chunk.choices[0] if chunk.choices else None
        details = usage.prompt_tokens_details if usage else None
        delta = choice.delta or choice.message if choice else None
        spoken = delta.content or delta.reasoning_content or delta.reasoning if delta else choice and choice.text
        return Event(
            text=spoken or "",
            num_tokens=len(choice.token_ids) if choice and choice.token_ids is not None else None,
            total_tokens=usage.completion_tokens if usage and choice else None,
            finish_reason=choice.finish_reason if choice else None,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=details.cached_tokens if details else None,
            completion_tokens=usage.completion_tokens if usage else None,
        )

    parse_whole = parse  # a whole answer has the fields of a chunk, all at once

    def _shared(self, turn: Turn, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": sampling.model,
            "max_tokens": turn.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": sampling.stream,
        }
        if sampling.stream:
            body["stream_options"] = {"include_usage": True}
            if sampling.running_usage:
                body["stream_options"]["continuous_usage_stats"] = True
        return body | _if_given(turn, sampling)


def _if_given(turn: Turn, sampling: Sampling) -> dict[str, Any]:
    """Fields that are only sent where they say something; OpenAI's servers and llama.cpp's call them alike."""
    given: dict[str, Any] = {"seed": sampling.seed} if sampling.seed is not None else {}
    given |= {"stop": sampling.stop} if sampling.stop else {}
    return given | ({"ignore_eos": True} if turn.ignore_end else {})


class OpenAICompletions(OpenAI):
    name = "openai-completions"
    path = "/v1/completions"
    takes_ids = True

    def body(self, turn: Turn, sampling: Sampling) -> dict[str, Any]:
        body = self._shared(turn, sampling) | {"prompt": turn.ids or _plain_text(turn)}
        if turn.suffix is not None:
            body["suffix"] = turn.suffix
        return body | sampling.extra


class OpenAIChat(OpenAI):
    name = "openai-chat"
    path = "/v1/chat/completions"

    def body(self, turn: Turn, sampling: Sampling) -> dict[str, Any]:
        if turn.ids or turn.suffix is not None:
            raise ConfigError(
                "the chat dialect takes neither token ids nor a hole: use openai-completions, or another workload"
            )
        messages = [{"role": m.role, "content": m.content} for m in turn.messages]
        return (
            self._shared(turn, sampling)
            | {"messages": messages or [{"role": "user", "content": turn.text}]}
            | sampling.extra
        )


class _TgiToken(msgspec.Struct):
    text: str = ""
    special: bool = False


class _TgiDetails(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int | None = None
    input_length: int | None = None


class _TgiEvent(msgspec.Struct):
    token: _TgiToken | None = None
    generated_text: str | None = None
    details: _TgiDetails | None = None
    error: Any = None


class Tgi:
    """TGI's /generate_stream: one token an event, special tokens count but are no text, no [DONE]. Whole: /generate."""

    name = "tgi"
    path = "/generate_stream"
    takes_ids = False

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_TgiEvent).decode

    def path_of(self, turn: Turn, sampling: Sampling) -> str:
        return self.path if sampling.stream else "/generate"

    def body(self, turn: Turn, sampling: Sampling) -> dict[str, Any]:
        if turn.ids or turn.suffix is not None:
            raise ConfigError("TGI takes text only: use text prompts (--tokenizer) or --fim-template")
        parameters: dict[str, Any] = {"max_new_tokens": turn.max_tokens, "details": True, "do_sample": False}
        if sampling.temperature > 0:
            parameters |= {"do_sample": True, "temperature": sampling.temperature}
            if 0 < sampling.top_p < 1:
                parameters["top_p"] = sampling.top_p
        given = _if_given(turn, sampling)
        parameters |= {name: given[name] for name in ("seed", "stop") if name in given}  # it knows no ignore_eos
        return {"inputs": _plain_text(turn), "parameters": parameters | sampling.extra, "stream": sampling.stream}

    def parse(self, data: bytes) -> Event:
        event = self._decode(data)
        if event.error is not None:
            return Event(error=error_text(event.error), is_end=True)
        details = event.details or _TgiDetails()
        token = event.token
        is_last = event.generated_text is not None
        return Event(
            text="" if token is None or token.special else token.text,
            num_tokens=int(token is not None),
            finish_reason=details.finish_reason or ("unknown" if is_last else None),
            prompt_tokens=details.input_length,
            completion_tokens=details.generated_tokens,
            is_end=is_last,
        )

    def parse_whole(self, body: bytes) -> Event:
        text = self._decode(body).generated_text or ""
        return msgspec.structs.replace(self.parse(body), text=text, num_tokens=None)


class _LlamaTimings(msgspec.Struct):
    cache_n: int | None = None


class _LlamaEvent(msgspec.Struct):
    content: str = ""
    tokens: list[int] | None = None
    stop: bool = False
    stop_type: str | None = None
    stopped_limit: bool = False
    tokens_predicted: int | None = None
    tokens_evaluated: int | None = None
    timings: _LlamaTimings | None = None
    error: Any = None


class LlamaCpp:
    """llama.cpp's own /completion (and /infill for a hole): the last event has stop: true, no [DONE]."""

    name = "llama-cpp"
    path = "/completion"
    takes_ids = True

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_LlamaEvent).decode

    def path_of(self, turn: Turn, sampling: Sampling) -> str:
        return "/infill" if turn.suffix is not None else self.path

    def body(self, turn: Turn, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "n_predict": turn.max_tokens,
            "stream": sampling.stream,
            "temperature": sampling.temperature,
            "return_tokens": True,
            "cache_prompt": True,
        }
        if turn.suffix is not None:
            body |= {"input_prefix": turn.text, "input_suffix": turn.suffix}
        else:
            body["prompt"] = turn.ids or _plain_text(turn)
        return body | _if_given(turn, sampling) | sampling.extra

    def parse(self, data: bytes) -> Event:
        event = self._decode(data)
        if event.error is not None:
            return Event(error=error_text(event.error), is_end=True)
        if not event.stop:
            return Event(text=event.content, num_tokens=len(event.tokens) if event.tokens else None)
        reason = event.stop_type or ("limit" if event.stopped_limit else "eos")
        return Event(
            text=event.content,
            num_tokens=len(event.tokens) if event.tokens else None,
            finish_reason="length" if reason == "limit" else "stop",
            prompt_tokens=event.tokens_evaluated,
            cached_tokens=event.timings.cache_n if event.timings else None,
            completion_tokens=event.tokens_predicted,
            is_end=True,
        )

    parse_whole = parse  # a whole answer is the last event, with all of the text


DIALECTS: dict[str, type[Dialect]] = {d.name: d for d in (OpenAICompletions, OpenAIChat, Tgi, LlamaCpp)}


def make_dialect(name: str) -> Dialect:
    """Raises ConfigError for an unknown name."""
    if name not in DIALECTS:
        raise ConfigError(f"unknown dialect {name!r}; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]()


def error_text(error: Any) -> str:
    """One line from any server's error object."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("error") or error
    return " ".join(str(error).split())[:300]


def decode_event(dialect: Dialect, data: bytes) -> Event:
    """Raises InputError when the data is not what this dialect's servers send."""
    if data == b"[DONE]":
        return Event(is_end=True)
    try:
        return dialect.parse(data)
    except UNREADABLE as error:
        shown = data[:80].decode("utf-8", "replace")
        raise InputError(f"broken SSE: an event is not {dialect.name} JSON ({error}): {shown!r}") from None


def decode_whole(dialect: Dialect, body: bytes) -> Event:
    """An answer that did not stream. Raises InputError when it is not what this dialect's servers send."""
    try:
        return dialect.parse_whole(body)
    except UNREADABLE as error:
        shown = body[:80].decode("utf-8", "replace")
        raise InputError(f"the answer is not {dialect.name} JSON ({error}): {shown!r}") from None


def _plain_text(turn: Turn) -> str:
    """A text dialect's prompt; a chat turn becomes its messages' contents, one below the other."""
    return turn.text or "\n".join(m.content for m in turn.messages)
