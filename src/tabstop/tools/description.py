"""Tools in a system message, for chat templates that know none: a format was named for the model (--tool-format)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tabstop.tools import NAME, CallSyntax, ToolFormat
from tabstop.tools.replay import arguments_of

Message = Mapping[str, Any]


def described(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> list[Message]:
    """The messages, with the tools at the end of the first system message, and earlier calls as text."""
    listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    example = _spelled([("function_name", {"key": "value"})], form.syntax)
    text = (
        f"You can call these functions; each is described by one line of JSON:\n{listed}\n\n"
        f"To call a function, answer with nothing but this:\n{example}\n\n"
        "Results of calls come in messages of the role tool. Where no function helps, answer in words."
    )
    first, *rest = (_with_calls(message, form.syntax) for message in messages)
    if first["role"] in ("system", "developer"):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, first, *rest]


def _with_calls(message: Message, syntax: CallSyntax) -> Message:
    functions = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    calls = [(str(f.get("name")), arguments_of(f.get("arguments"))) for f in functions if isinstance(f, Mapping)]
    if not calls:
        return message
    return {**message, "content": "\n".join(filter(None, (message.get("content"), _spelled(calls, syntax))))}


def _spelled(calls: Sequence[tuple[str, Mapping[str, Any]]], syntax: CallSyntax) -> str:
    """As the model writes them."""
    write = json.dumps if syntax.arguments == "json" else _parameters
    spelled = [syntax.before.replace(NAME, name) + write(arguments) + syntax.after for name, arguments in calls]
    return syntax.opening + (syntax.separator or "\n").join(spelled) + syntax.closing


def _parameters(arguments: Mapping[str, Any]) -> str:
    shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in shown.items())
