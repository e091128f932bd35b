"""Messages as clients write them → a Conversation, the same for HTTP and the offline API; no template, no ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tabstop.errors import InputError, NotSupportedError
from tabstop.text.chat import ROLES, Conversation


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message: text, or what the assistant thought before it."""

    type: str = "text"
    text: str | None = None
    thinking: str | list[ThoughtPart] | None = None
    reasoning: str | None = None


class ThoughtPart(msgspec.Struct, kw_only=True):
    """Mistral writes thoughts as parts, too."""

    type: str = "text"
    text: str | None = None


class MessageBody(msgspec.Struct, kw_only=True):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    prefix: bool | None = None  # on the last message: the answer continues it
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning_content: str | None = None  # what the assistant thought; the template decides what of it is shown
    reasoning: str | None = None  # another name of it


Messages = Annotated[list[MessageBody], Meta(min_length=1, max_length=16384)]


def read_messages(messages: Any) -> list[MessageBody]:
    """Messages from Python dicts. Raises InputError."""
    try:
        return msgspec.convert(messages, Messages)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        place = f"messages{path.strip('`')}"
        raise InputError(f"{place}: {problem[:1].lower()}{problem[1:]}", param="messages") from None


def make_conversation(
    messages: Sequence[MessageBody],
    add_generation_prompt: bool = True,
    continues: bool | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    switches: Mapping[str, bool | str] | None = None,
) -> Conversation:
    """`continues`: the last message is the beginning of the answer; None: if it is the assistant's and calls nothing.

    Raises InputError or NotSupportedError.
    """
    last = messages[-1]
    if continues is None:
        continues = (last.role == "assistant" and not last.tool_calls) or last.prefix is True
    if continues and last.role != "assistant":
        raise InputError("only a last message of the assistant can be continued", param="messages")
    read = [_message(*entry) for entry in enumerate(messages)]
    return Conversation(read, add_generation_prompt, continues, tools, switches or {})


TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")


def read_switches(given: Any, effort: str | None = None) -> dict[str, bool | str]:
    """Variables for the template, from chat_template_kwargs and reasoning_effort. Raises InputError, NotSupportedError.

    Only plain switches that are known: with arbitrary ones a request could replace the messages, or the template.
    """
    if given is not None and not isinstance(given, dict):
        raise InputError("chat_template_kwargs must be an object", param="chat_template_kwargs")
    found: dict[str, bool | str] = {}
    if effort is not None:
        found["reasoning_effort"] = effort
    for name, value in (given or {}).items():
        if name not in SWITCHES:
            raise NotSupportedError(
                f"`chat_template_kwargs` takes {', '.join(SWITCHES)}; nothing else reaches a template",
                param="chat_template_kwargs",
            )
        if value is not None:
            found[name] = value
    for name, value in found.items():
        if value not in SWITCHES[name] or isinstance(value, bool) is not isinstance(SWITCHES[name][0], bool):
            shown = ", ".join(str(allowed).lower() for allowed in SWITCHES[name])
            raise InputError(f"`{name}` must be one of {shown}", param=name)
    if found.get("reasoning_effort") == "none":
        return {"enable_thinking": False, "thinking": False, **found}
    return found


SWITCHES: dict[str, tuple[bool | str, ...]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning_effort": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
}
"""Name → values."""


def _message(index: int, message: MessageBody) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InputError(f"messages[{index}].role must be one of {', '.join(ROLES)}", param="messages")
    content, thoughts = message.content, message.reasoning_content or message.reasoning
    if isinstance(content, list):
        for part in content:
            if part.type not in (*TEXT_PARTS, *(THOUGHT_PARTS if message.role == "assistant" else ())):
                raise NotSupportedError(f"messages[{index}] has a part that is not text", param="messages")
        thoughts = thoughts or "".join(map(_thoughts, content))
        content = "".join(part.text or "" for part in content if part.type in TEXT_PARTS)
    extra = {"name": message.name, "tool_call_id": message.tool_call_id, "tool_calls": message.tool_calls}
    if message.role == "assistant":
        extra |= {"reasoning_content": thoughts, "thinking": thoughts}  # whichever name the template reads
    return {"role": message.role, "content": content or ""} | {key: value for key, value in extra.items() if value}


def _thoughts(part: ContentPart) -> str:
    if part.type not in THOUGHT_PARTS:
        return ""
    if isinstance(part.thinking, list):
        return "".join(inner.text or "" for inner in part.thinking)
    return part.thinking or part.reasoning or part.text or ""
