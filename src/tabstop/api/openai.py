"""OpenAI's dialect: /v1/completions and /v1/chat/completions. Body → Call and text delta → chunk, both pure.

Where OpenAI's own rules are narrower than its clients' habits the wider form is taken: 64 stop strings, top_k,
stop_token_ids, min_tokens, ignore_eos (vLLM's names), an assistant message at the end that the answer continues.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from tabstop.api.constraints import constraint_fields
from tabstop.api.errors import error_object
from tabstop.api.holes import confidence_object, fill_object, hole_fields, surroundings
from tabstop.api.logprobs import (
    NO_PROMPTS,
    PromptShown,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from tabstop.api.sampling import chat_num_logprobs, completion_num_logprobs, num_prompt_logprobs, sampling_fields
from tabstop.api.schema import ChatBody, CompletionBody, Generation, OllamaOptions, Refused
from tabstop.api.tools import new_calls, template_tools, tool_use, whole_calls
from tabstop.call import Call, Prompt, TextDelta, TextPrompt, TokenPrompt, Usage
from tabstop.errors import InputError, NotSupportedError, TabstopError
from tabstop.text.chat import Conversation
from tabstop.text.fim import FillReport, Hole
from tabstop.text.messages import make_conversation, read_switches
from tabstop.text.reporting import ReportedToken
from tabstop.types import FinishReason, Priority

DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions when it is not given, as OpenAI documents it; chats may fill the context."""

MAX_PROMPTS = 1024

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "modalities": (["text"],),
}
"""Parameters that are not supported → values that ask for nothing, beside null and empty ones (schema.Refused)."""

REASONS = {
    "chat_template": "templates come from the checkpoint, never from a request",
}

FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.DEADLINE: "length",
    FinishReason.SUPERSEDED: "stop",
}
"""ABORT and ERROR never get here: they end the answer with an error."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what its headers say."""

    request_id: str = ""
    tenant: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    best_priority: Priority = Priority.INTERACTIVE  # a request that asks for a better class gets this one
    spend_tokens: Callable[[int], None] | None = None


# ---- body → Call


def completion_call(body: CompletionBody, caller: Caller) -> Call:
    """Raises InputError or NotSupportedError, naming the parameter."""
    if body.options is not None:
        body = _with_options(body, body.options)
    bos = body.add_special_tokens is not False
    prompts: Sequence[Prompt] = prompts_of(body.prompt, bos)
    if body.suffix or body.files:
        prompts = [_hole(prompt, body) for prompt in prompts]
    if body.distinct and len(prompts) > 1:
        raise InputError("distinct needs one prompt: whose choices are left could not be told", param="distinct")
    return Call(
        prompts=tuple(prompts),
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        echo=bool(body.echo),
        num_logprobs=completion_num_logprobs(body),
        num_prompt_logprobs=num_prompt_logprobs(body),
        **shared(body, caller) | hole_fields(body),
    )


def _with_options(body: CompletionBody, options: OllamaOptions) -> CompletionBody:
    """Editors that speak Ollama's dialect to this path name their limits there; what the body itself says wins."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed", "stop")}
    given["max_tokens"] = options.num_predict if (options.num_predict or -1) >= 0 else None
    missing = {name: value for name, value in given.items() if value is not None and getattr(body, name) is None}
    return msgspec.structs.replace(body, **missing)


def _hole(prompt: Prompt, body: CompletionBody) -> Hole:
    if not isinstance(prompt, TextPrompt):
        raise InputError("suffix and files need prompts as text, not as token ids", param="prompt")
    return Hole(prompt.text, body.suffix or "", surroundings(body), body.fim_order or "")


def chat_call(body: ChatBody, caller: Caller) -> Call:
    """Raises InputError or NotSupportedError, naming the parameter."""
    _refuse_unsupported(body, ("chat_template", "documents", "modalities", "audio", "echo"))
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    fields = shared(body, caller)
    fields |= {"num_logprobs": chat_num_logprobs(body), "num_prompt_logprobs": num_prompt_logprobs(body)}
    fields |= {"tools": tool_use(body, fields["constraints"]), "reasoning": _reasoning(body)}
    fields["constraint_param"] = fields["constraint_param"] or ("tools" if fields["tools"] else None)
    return Call(prompts=(conversation(body),), max_tokens=max_tokens, **fields)


def conversation(body: Any) -> Conversation:
    """Of a ChatBody, TokenizeBody or TemplateBody. A last message of the assistant is the beginning of the answer."""
    asked = getattr(body, "continue_final_message", None)
    tools, switches = template_tools(body.tools), read_switches(body.chat_template_kwargs, body.reasoning_effort)
    return make_conversation(body.messages, body.add_generation_prompt is not False, asked, tools, switches)


def _reasoning(body: ChatBody) -> Literal["apart", "hidden", "inline"]:
    """Where thoughts go, in the words of vLLM, SGLang and llama.cpp."""
    if body.separate_reasoning is False or body.reasoning_format == "none":
        return "inline"
    return "hidden" if body.include_reasoning is False else "apart"


def prompts_of(prompt: str | list[Any] | None, bos: bool) -> list[Prompt]:
    """A text, some texts, ids, or some lists of ids."""
    if prompt is None or isinstance(prompt, str):
        return [TextPrompt(prompt or "", bos)]
    if not prompt:
        raise InputError("prompt is an empty list", param="prompt")
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [TokenPrompt(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise InputError(f"at most {MAX_PROMPTS} prompts are allowed", param="prompt")
    if kinds == {str}:
        return [TextPrompt(text, bos) for text in prompt]
    if kinds == {list}:
        return [TokenPrompt(ids) for ids in prompt]
    raise InputError("prompt mixes kinds; give a text, texts, token ids, or lists of token ids", param="prompt")


def shared(body: Generation, caller: Caller) -> dict[str, Any]:
    """What all kinds of call take alike: fields of Call. Raises InputError or NotSupportedError."""
    _refuse_unsupported(body, Refused.__struct_fields__)
    cache = body.cache
    return {
        "model": body.model or "",
        "request_id": caller.request_id,
        "tenant": caller.tenant,
        "spend_tokens": caller.spend_tokens,
        "client": caller.headers.get("user-agent", ""),
        **sampling_fields(body),
        **constraint_fields(body),
        "min_tokens": body.min_tokens or 0,
        "stop_strings": (body.stop,) if isinstance(body.stop, str) else tuple(dict.fromkeys(body.stop or ())),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
        "keep_stop_string": bool(body.include_stop_str_in_output),
        "priority": max(_priority(body.priority or caller.headers.get("x-priority")), caller.best_priority),
        "deadline_ms": _deadline_ms(body, caller),
        "session": _first(body.session, body.prompt_cache_key, body.user, caller.headers.get("x-session-id")),
        "cache_salt": body.cache_salt or "",
        "cache_read": body.cache_prompt is not False and (cache is None or cache.read),
        "cache_write": cache is None or cache.write,
        "cache_retain": cache is None or cache.retain,
    }


def _first(*values: str | None) -> str:
    return next((value for value in values if value), "")


def _priority(name: str | None) -> Priority:
    if not name:
        return Priority.NORMAL
    try:
        return Priority[name.upper()]
    except KeyError:
        raise InputError("priority must be interactive, normal or background", param="priority") from None


def _deadline_ms(body: Generation, caller: Caller) -> int | None:
    if body.deadline_ms is not None:
        return body.deadline_ms
    if body.timeout is not None:
        return max(1, int(body.timeout * 1000))
    header = caller.headers.get("x-deadline-ms")
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) < 10 and int(header)):
        raise InputError("the header x-deadline-ms must be a whole number of milliseconds", param="deadline_ms")
    return int(header)


def _refuse_unsupported(body: Generation, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(body, name)
        if value is not None and value not in ("", [], {}) and value not in NEUTRAL.get(name, ()):
            raise _not_supported(name)


def _not_supported(name: str) -> NotSupportedError:
    neutral = " or ".join(msgspec.json.encode(value).decode() for value in NEUTRAL.get(name, ()))
    default = f"leave it out{' or set it to ' + neutral if neutral else ''}"
    return NotSupportedError(f"`{name}`: " + REASONS.get(name, f"not supported by this server; {default}"), param=name)


# ---- deltas → JSON


class OpenAIFormat:
    """What chunks and whole answers of both paths share."""

    media_type = "text/event-stream"
    id_prefix = ""
    chunk_object = ""
    whole_object = ""

    def __init__(self, model: str, num_choices: int, include_usage: bool, shown: PromptShown = NO_PROMPTS) -> None:
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._shown = shown
        self._base = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def opening(self) -> bytes:
        return b""

    def closing(self, usage: Usage) -> bytes:
        counts = self._event([], usage=usage_object(usage)) if self._include_usage else b""
        return counts + b"data: [DONE]\n\n"

    def failure(self, error: TabstopError) -> bytes:
        return _event({"error": error_object(error)}) + b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        return _event({**self._base, "object": self.chunk_object, "choices": choices, **extra})

    def _listed(self, choice: TextDelta) -> dict[str, Any]:
        """vLLM's prompt_logprobs, where they were asked for."""
        count, prompt = self._shown.listed, choice.prompt
        if count is None:
            return {}
        return {"prompt_logprobs": None if prompt is None else prompt_logprobs(prompt, count)}

    def _whole(
        self, choices: list[dict[str, Any]], usage: Usage, fill: FillReport | None = None, **extra: Any
    ) -> bytes:
        answer = {**self._base, "object": self.whole_object, "choices": choices, "usage": usage_object(usage)}
        return msgspec.json.encode(answer | fill_object(fill) | extra)


class CompletionFormat(OpenAIFormat):
    """/v1/completions."""

    id_prefix = "cmpl-"
    chunk_object = whole_object = "text_completion"

    def delta(self, delta: TextDelta) -> bytes:
        return self._event([self._choice(delta)], **fill_object(delta.fill))

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        shown = [self._choice(choice) | self._listed(choice) for choice in choices]
        return self._whole(shown, usage, choices[0].fill)

    def _choice(self, delta: TextDelta) -> dict[str, Any]:
        if self._shown.echoed is None or delta.prompt is None:
            logprobs = completion_logprobs(delta.logprobs)
        else:
            logprobs = echoed_logprobs(delta.prompt, self._shown.echoed, delta.logprobs)
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, **_finish(delta)}


class ChatFormat(OpenAIFormat):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._event([_chat_choice(index, "delta", role)]) for index in range(self._num_choices))

    def delta(self, delta: TextDelta) -> bytes:
        content, logprobs = b"", delta.logprobs
        if delta.reasoning:
            shown: dict[str, Any] = {"reasoning_content": delta.reasoning}
            content = self._event([_chat_choice(delta.index, "delta", shown, logprobs=logprobs)])
            logprobs = []
        calls = new_calls(delta.calls)
        if delta.text or logprobs or calls:
            shown = {"content": delta.text} if delta.text or not calls else {}
            shown |= {"tool_calls": calls} if calls else {}
            content += self._event([_chat_choice(delta.index, "delta", shown, logprobs=logprobs)])
        return content + (self._event([_chat_choice(delta.index, "delta", {}, delta)]) if delta.finish else b"")

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        return self._whole(chat_choices(choices, "message"), usage, **self._listed(choices[0]))


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, always with the cached tokens."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }
    if usage.num_reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.num_reasoning_tokens}
    return counts


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _finish(delta: TextDelta | None) -> dict[str, Any]:
    if delta is None or delta.finish is None:
        return {"finish_reason": None}
    calls = delta.has_calls and delta.finish is FinishReason.STOP
    finish: dict[str, Any] = {"finish_reason": "tool_calls" if calls else FINISH_REASONS[delta.finish]}
    finish |= {} if delta.stop_reason is None else {"stop_reason": delta.stop_reason}
    return finish | confidence_object(delta.confidence)


def chat_choices(choices: Sequence[TextDelta], key: str) -> list[dict[str, Any]]:
    """Chat-shaped choices; `key`: message, or delta (which holds what is new)."""
    show = _message if key == "message" else _news
    return [_chat_choice(choice.index, key, show(choice), choice, logprobs=choice.logprobs) for choice in choices]


def _message(choice: TextDelta) -> dict[str, Any]:
    """A whole one; without content where there are but calls."""
    calls = whole_calls(choice.calls)
    shown = {"role": "assistant"} | _thoughts(choice) | {"content": choice.text or (None if calls else "")}
    return shown | ({"tool_calls": calls} if calls else {})


def _news(choice: TextDelta) -> dict[str, Any]:
    return _thoughts(choice) | ({"content": choice.text} if choice.text else {})


def _thoughts(choice: TextDelta) -> dict[str, str]:
    return {"reasoning_content": choice.reasoning} if choice.reasoning else {}


def _chat_choice(
    index: int,
    key: str,
    content: dict[str, Any],
    ended: TextDelta | None = None,
    *,
    logprobs: Sequence[ReportedToken] = (),
) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": chat_logprobs(logprobs), **_finish(ended)}
