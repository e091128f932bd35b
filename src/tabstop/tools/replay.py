"""Calls of earlier turns, as a template wants to be given them.

OpenAI's clients send arguments as JSON texts and no content beside calls. Most templates want objects, some want
texts; some ask whether the content is none, others would print "None". What a template makes of a call shows which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str | None]
"""Messages → what the template writes; None where it refuses."""

NAME, KEY = "probed_function", "probed_argument"
CALL = {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": f'{{"{KEY}": 1}}'}}
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
)


@dataclass(frozen=True, slots=True)
class CallShape:
    """How a template wants the assistant's messages with calls."""

    as_objects: bool = True  # arguments; else JSON texts
    with_none: bool = False  # where there is no content; else an empty text

    def shaped(self, message: Message) -> Message:
        """The message as the template wants it; one without calls as it is."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        content = message.get("content") or (None if self.with_none else "")
        return {**message, "content": content, "tool_calls": [self._call(call) for call in calls]}

    def _call(self, call: Any) -> Any:
        """Calls that are no calls stay what they are: the template says what it thinks of them."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        given = function.get("arguments")
        arguments: Any = _object(given)
        if not self.as_objects:
            arguments = given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}


SHAPES = (CallShape(True, False), CallShape(True, True), CallShape(False, False), CallShape(False, True))


def find_shape(render: Render) -> CallShape:
    """The first of SHAPES in which the template shows a call as JSON, and no Python; the first where it shows none."""
    for shape in SHAPES:
        text = render([shape.shaped(message) for message in PROBE])
        if text is not None and NAME in text and KEY in text and f"'{KEY}'" not in text and "None" not in text:
            return shape
    return SHAPES[0]


def _object(arguments: Any) -> dict[str, Any]:
    """Of a JSON text. A model's mistake, sent back, must not cost the conversation: it becomes an object, too."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, escaped in a text, is none
    except (ValueError, RecursionError):
        value = arguments
    return value if isinstance(value, dict) else {"arguments": value}
