"""What every dialect's bodies lead to: prompts and fields of a Call, and who sent it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tabstop.api.constraints import constraint_fields
from tabstop.api.sampling import sampling_fields
from tabstop.api.schema import Generation, Refused
from tabstop.api.tools import template_tools
from tabstop.call import Prompt, TextPrompt, TokenPrompt
from tabstop.errors import InputError, NotSupportedError
from tabstop.text.chat import Conversation
from tabstop.text.messages import make_conversation, read_switches
from tabstop.types import Priority

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


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what its headers say."""

    request_id: str = ""
    tenant: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    best_priority: Priority = Priority.INTERACTIVE  # a request that asks for a better class gets this one
    spend_tokens: Callable[[int], None] | None = None


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


def conversation(body: Any) -> Conversation:
    """Of a body with messages. A last message of the assistant is the beginning of the answer."""
    asked = getattr(body, "continue_final_message", None)
    tools, switches = template_tools(body.tools), read_switches(body.chat_template_kwargs, body.reasoning_effort)
    return make_conversation(body.messages, body.add_generation_prompt is not False, asked, tools, switches)


def shared_fields(body: Generation, caller: Caller) -> dict[str, Any]:
    """What all kinds of call take alike: fields of Call. Raises InputError or NotSupportedError."""
    refuse_unsupported(body, Refused.__struct_fields__)
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


def refuse_unsupported(body: Generation, names: Sequence[str]) -> None:
    """Raises NotSupportedError where one of these parameters asks for something."""
    for name in names:
        value = getattr(body, name)
        if value is not None and value not in ("", [], {}) and value not in NEUTRAL.get(name, ()):
            raise _not_supported(name)


def _not_supported(name: str) -> NotSupportedError:
    neutral = " or ".join(msgspec.json.encode(value).decode() for value in NEUTRAL.get(name, ()))
    default = f"leave it out{' or set it to ' + neutral if neutral else ''}"
    return NotSupportedError(f"`{name}`: " + REASONS.get(name, f"not supported by this server; {default}"), param=name)
