"""Calls of earlier turns, as a template wants to be given them.

OpenAI's clients send arguments as JSON texts and no content beside calls. Most templates want objects, some want
texts; some ask whether the content is none, others would print "None". What a template makes of a call shows which.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str | None]
"""Messages → what the template writes; None where it refuses."""

NAME, KEY = "probed_function", "probed_argument"
ID = "call_0123456789abcdef01234567"
CALL = {"id": ID, "type": "function", "function": {"name": NAME, "arguments": f'{{"{KEY}": 1}}'}}
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "!", "name": NAME, "tool_call_id": ID},
)

SHORT_ID = 9
"""Characters, letters and digits, of ids in Mistral's templates, which refuse all others."""


@dataclass(frozen=True, slots=True)
class CallShape:
    """How a template wants messages with calls, and those with their results."""

    as_objects: bool = True  # arguments; else JSON texts
    with_none: bool = False  # where there is no content; else an empty text
    short_ids: bool = False  # of SHORT_ID characters; else those that clients send back

    def shaped(self, message: Message) -> Message:
        """The message as the template wants it; one without calls as it is."""
        called = message.get("tool_call_id")
        if self.short_ids and isinstance(called, str):
            return {**message, "tool_call_id": _shortened(called)}
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
        arguments: Any = arguments_of(given)
        if not self.as_objects:
            arguments = given if isinstance(given, str) and given.strip() else json.dumps(arguments, ensure_ascii=False)
        shaped = {**call, "function": {**function, "arguments": arguments}}
        return shaped | {"id": _shortened(str(call.get("id")))} if self.short_ids else shaped


SHAPES = tuple(CallShape(*switches) for switches in product((True, False), (False, True), (False, True)))


def find_shape(render: Render) -> CallShape:
    """The first of SHAPES in which the template shows a call as JSON, and no Python; the first where it shows none.

    A template that refuses results of calls, or knows none, is asked without.
    """
    for probe in (PROBE, PROBE[:-1]):
        for shape in SHAPES:
            text = render([shape.shaped(message) for message in probe])
            if text is not None and NAME in text and KEY in text and f"'{KEY}'" not in text and "None" not in text:
                return shape
    return SHAPES[0]


def _shortened(given: str) -> str:
    """The same for the same id; one that is right already stays."""
    if len(given) == SHORT_ID and given.isascii() and given.isalnum():
        return given
    return hashlib.sha256(given.encode(errors="replace")).hexdigest()[:SHORT_ID]


def arguments_of(arguments: Any) -> dict[str, Any]:
    """As an object. A model's mistake, sent back, must not cost the conversation: it becomes an object, too."""
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
