"""Messages as clients write them → a Conversation, the same for HTTP and the offline API; no template, no ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tabstop.errors import InputError, NotSupportedError
from tabstop.text.chat import ROLES, Conversation


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message; only type text is supported."""

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
) -> Conversation:
    """`continues`: the last message is the beginning of the answer; None: if it is the assistant's and calls nothing.

    Raises InputError or NotSupportedError.
    """
    last = messages[-1]
    if continues is None:
        continues = (last.role == "assistant" and not last.tool_calls) or last.prefix is True
    if continues and last.role != "assistant":
        raise InputError("only a last message of the assistant can be continued", param="messages")
    return Conversation([_message(*entry) for entry in enumerate(messages)], add_generation_prompt, continues, tools)


def _message(index: int, message: MessageBody) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InputError(f"messages[{index}].role must be one of {', '.join(ROLES)}", param="messages")
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type not in ("text", "input_text", "output_text"):
                raise NotSupportedError(f"messages[{index}] has a part that is not text", param="messages")
        content = "".join(part.text or "" for part in content)
    extra = {"name": message.name, "tool_call_id": message.tool_call_id, "tool_calls": message.tool_calls}
    return {"role": message.role, "content": content or ""} | {key: value for key, value in extra.items() if value}
