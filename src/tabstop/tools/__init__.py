"""Tools: functions that a request offers, and the calls of them that a model writes, each family in its own way.

The folder's contract. A ToolFormat reads calls out of a text as it grows (reader.py has what they share) and says how
they are spelled, so that a grammar can ask for them (constraint.py). replay.py shows calls of earlier turns to a
template; description.py tells of tools where the template knows none. A new format is one file and one line in
FORMATS. Knows texts only: no tokens, no HTTP.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from tabstop.errors import ConfigError

if TYPE_CHECKING:
    from tabstop.tools.reader import CallReader

Value = TypeVar("Value")
Steps = Generator[None, None, Value]
"""A reading that waits, by yielding, for more text."""


MAX_NAME = 64
"""Characters of a function's name, as OpenAI has it."""

NAME = "%name%"
"""Where the name comes in a CallSyntax."""


@dataclass(frozen=True, slots=True)
class Function:
    """One that may be called."""

    name: str
    parameters: Mapping[str, Any] | None = None  # a JSON schema; None: any object
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says of calls in its answer; one that must not call anything has none of this."""

    functions: tuple[Function, ...]  # those that may be called
    is_required: bool = False  # the answer is a call, or several
    is_parallel: bool = True  # else it has one call at most


@dataclass(slots=True)
class CallPiece:
    """What is new of one call."""

    index: int  # among the calls of its answer
    id: str = ""  # with the name, in a call's first piece
    name: str = ""
    arguments: str = ""  # JSON; pieces make it up
    has_failed: bool = False  # it is no call after all: the text of it came as content


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How a model spells calls: opening, then before + arguments + after for each, then closing.

    `before` has NAME where the function's name comes; `arguments`: json, or xml as Qwen3-Coder writes it.
    """

    before: str
    after: str
    opening: str = ""
    separator: str | None = ""  # None: there is one call at most
    closing: str = ""
    arguments: str = "json"


class ToolFormat(Protocol):
    """How one family of models writes calls."""

    @property
    def syntax(self) -> CallSyntax: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be control tokens of a vocabulary, which would not show in a text otherwise."""
        ...

    def read(self, calls: CallReader) -> Steps[None]:
        """Reads on: text, and the calls that come next. Called again and again; ends by growing.Ended."""
        ...


class FindFormat(Protocol):
    """A format's entry in the registry."""

    def __call__(self, template: str) -> ToolFormat | None:
        """The format as this chat template has it; None: it is not the template's."""
        ...


FORMATS: dict[str, str] = {
    "qwen3_coder": "tabstop.tools.qwen_coder",
    "deepseek": "tabstop.tools.deepseek",
    "mistral": "tabstop.tools.mistral",
    "granite": "tabstop.tools.granite",
    "llama3": "tabstop.tools.llama3",
    "hermes": "tabstop.tools.hermes",
}
"""Name → module with `find: FindFormat` and `make(template) -> ToolFormat`. The first that finds itself is taken."""

CHOICES = ("auto", "off", *sorted(FORMATS))
"""Of --tool-format."""


def load_format(template: str | None, asked: str = "auto") -> ToolFormat | None:
    """The format of a model with this chat template; `asked`: one of CHOICES. Raises ConfigError."""
    if asked not in CHOICES:
        raise ConfigError(f"--tool-format is {asked!r}; choose one of {', '.join(CHOICES)}")
    if asked == "off" or template is None:
        return None
    if asked != "auto":
        made: ToolFormat = import_module(FORMATS[asked]).make(template)
        return made
    if "tools" not in template:
        return None
    found = (import_module(module).find(template) for module in FORMATS.values())
    return next((form for form in found if form is not None), None)
