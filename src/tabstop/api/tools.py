"""Tools in OpenAI's words: what a body offers and asks → ToolUse, and pieces of calls → `tool_calls`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tabstop.errors import InputError, NotSupportedError
from tabstop.tools import MAX_NAME, CallPiece, Function, ToolUse
from tabstop.types import ConstraintSpec

MAX_TOOLS = 128

NAME = re.compile(rf"[a-zA-Z0-9_.-]{{1,{MAX_NAME}}}")

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}

CHOICES = "none, auto, required, or {'type': 'function', 'function': {'name': …}}"

REQUIRED = ("required", "any")  # the second is Mistral's word


def template_tools(given: Any) -> list[dict[str, Any]] | None:
    """A body's `tools` as chat templates are told of them; None for none. Raises InputError or NotSupportedError."""
    if given is None or given == []:
        return None
    if not isinstance(given, list):
        raise InputError("tools must be a list", param="tools")
    if len(given) > MAX_TOOLS:
        raise InputError(f"{len(given)} tools are too many; at most {MAX_TOOLS} are allowed", param="tools")
    tools = [_template_tool(at, tool) for at, tool in enumerate(given)]
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two tools are called {twice!r}; give each a name of its own", param="tools")
    return tools


def _template_tool(at: int, tool: Any) -> dict[str, Any]:
    place = f"tools[{at}]"
    if not isinstance(tool, dict):
        raise InputError(f"{place} must be an object", param="tools")
    kind = tool.get("type", "function")
    if kind != "function":
        raise NotSupportedError(f"{place}: only type function is supported", param="tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InputError(f"{place}: give the function as {{'function': {{'name': …}}}}", param="tools")
    name, parameters = function.get("name"), function.get("parameters")
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise InputError(f"{place}.function.name must have 1 to {MAX_NAME} of a-z, A-Z, 0-9, _, . and -", param="tools")
    if not isinstance(parameters, dict | None):
        raise InputError(f"{place}.function.parameters must be a JSON schema, as an object", param="tools")
    if parameters and not _may_be_object(parameters.get("type", "object")):
        raise InputError(f"{place}.function.parameters must be a schema of type object: arguments are", param="tools")
    if not isinstance(function.get("description"), str | None):
        raise InputError(f"{place}.function.description must be a text", param="tools")
    if not isinstance(function.get("strict"), bool | None):
        raise InputError(f"{place}.function.strict must be true or false", param="tools")
    told = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {"type": "function"} | tool | {"function": told | {"parameters": parameters or NO_PARAMETERS}}


def _may_be_object(kind: Any) -> bool:
    return kind == "object" or (isinstance(kind, list) and "object" in kind)


def tool_use(
    given: list[dict[str, Any]] | None, asked: Any, constraints: Sequence[ConstraintSpec], *, is_parallel: bool
) -> ToolUse | None:
    """What the answer may, or must, call; None for nothing. `asked`: tool_choice. `constraints`: of the text, if any.

    Raises InputError or NotSupportedError, naming the parameter.
    """
    tools = template_tools(given) or []
    strict = [bool(tool["function"].get("strict")) for tool in given or ()]
    functions = [
        Function(tool["function"]["name"], tool["function"]["parameters"], is_strict)
        for tool, is_strict in zip(tools, strict, strict=True)
    ]
    choice, allowed = _choice(asked)
    if allowed is not None:
        _check_known(allowed, [function.name for function in functions])
        functions = [function for function in functions if function.name in allowed]
    if choice in REQUIRED and not functions:
        raise InputError(f"tool_choice is {choice!r}, but there are no tools", param="tool_choice")
    if choice == "none" or not functions:
        return None
    if constraints and (choice in REQUIRED or constraints[0].kind != "json_schema"):
        reason = "the answer must be a call" if choice in REQUIRED else "only a JSON schema can stand beside tools"
        raise InputError(f"tools and a format of the text: {reason}; leave one of them out", param="tool_choice")
    is_one = isinstance(asked, dict) and asked.get("type") == "function"
    return ToolUse(tuple(functions), choice in REQUIRED, is_parallel and not is_one)


def _choice(given: Any) -> tuple[str, list[str] | None]:
    """(none, auto, required or any; the functions that alone may be called)."""
    if given is None or (isinstance(given, str) and given in ("none", "auto", *REQUIRED)):
        return given or "auto", None
    if isinstance(given, dict) and given.get("type") == "function":
        return "required", [_name(given)]
    if isinstance(given, dict) and given.get("type") == "allowed_tools":
        inner = given.get("allowed_tools", given)
        mode, tools = (inner.get("mode"), inner.get("tools")) if isinstance(inner, dict) else (None, None)
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return mode, [_name(tool) for tool in tools]
    raise InputError(f"tool_choice must be {CHOICES}", param="tool_choice")


def _name(given: Any) -> str:
    """Of {"function": {"name"}}, or {"name"}."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise InputError(f"tool_choice must be {CHOICES}", param="tool_choice")
    return name


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    if lost := next((name for name in names if name not in known), None):
        given = ", ".join(known[:8]) or "none"
        shown = repr(lost) if NAME.fullmatch(lost) else "what is no name"  # errors quote names, and nothing else
        raise InputError(f"tool_choice names {shown}, which is not among the tools: {given}", param="tool_choice")


# ---- pieces → JSON


def new_calls(pieces: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """`tool_calls` of a chunk: one entry for each call that has news."""
    shown: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if piece.has_failed:  # its text came as content; what the client has of it cannot be taken back
            continue
        entry = shown.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
        if piece.id:
            entry |= {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}}
        entry["function"]["arguments"] += piece.arguments
    return list(shown.values())


def whole_calls(pieces: Sequence[CallPiece]) -> list[dict[str, Any]]:
    """`tool_calls` of a message: the calls that did not fail."""
    failed = {piece.index for piece in pieces if piece.has_failed}
    calls = new_calls([piece for piece in pieces if piece.index not in failed])
    return [{key: value for key, value in call.items() if key != "index"} for call in calls]
