"""How large what a template asks for would be, known before it is made: numbers only, no Jinja.

A function here over-estimates rather than under-estimates; sizes are characters, and 16 for each entry of a list.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError

MAX_WIDTH = 1000
"""Of padding, indentation and numbers' digits."""

MAX_BITS = 4096
"""Of whole numbers."""

ENTRY_SIZE = 16
"""What a place in a list counts beside what stands there."""

NUM_TICKS = 64
"""The clock is read so rarely: reading it takes a third of a microsecond."""


class TemplateLimitError(TemplateError):
    """A template wants more than it gets. The message goes behind "the chat template"."""


class Budget:
    """What is left of one rendering's characters and time."""

    __slots__ = ("_end_time", "_num_ticks", "num_left")

    def __init__(self, num_characters: int, seconds: float) -> None:
        """`seconds`: of this thread's processor time, from now."""
        self.num_left = num_characters
        self._end_time = time.thread_time() + seconds
        self._num_ticks = NUM_TICKS

    def spend(self, num_characters: int) -> None:
        """Raises TemplateLimitError when that is more than is left."""
        self.num_left -= num_characters
        if self.num_left < 0:
            raise TemplateLimitError("writes too much for these messages; send less")
        if num_characters > 1 << 16:
            self._look()

    def tick(self) -> None:
        """Once in a while looks at the clock. Raises TemplateLimitError."""
        self._num_ticks -= 1
        if self._num_ticks <= 0:
            self._num_ticks = NUM_TICKS
            self._look()

    def _look(self) -> None:
        if time.thread_time() > self._end_time:
            raise TemplateLimitError("takes too long for these messages; send less")


def size_of(value: Any, most: int, *, are_texts_shared: bool = False, indent: int = 0) -> int:
    """About how long a value would be as text or JSON; stops counting a little above `most`.

    `are_texts_shared`: texts inside are held, not copied, and count as a place each. `indent`: of JSON, blanks a level.
    """
    total, waiting = 0, [(value, 1)]
    while waiting and total <= most:
        value, depth = waiting.pop()
        total += indent * depth
        if isinstance(value, str):
            total += ENTRY_SIZE if are_texts_shared else len(value) + 2
        elif isinstance(value, Mapping):
            total += ENTRY_SIZE
            for key, inner in value.items():
                waiting += ((key, depth + 1), (inner, depth + 1))
        elif isinstance(value, (list, tuple)):
            total += ENTRY_SIZE * (1 + len(value))
            waiting += [(inner, depth + 1) for inner in value] if total <= most else []
        else:
            total += ENTRY_SIZE
    return total


def shallow_size(value: Any) -> int:
    """Of a value whose entries were there before."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return ENTRY_SIZE * len(value) if isinstance(value, (list, tuple, dict)) else ENTRY_SIZE


# ---- operators


def _sum(left: Any, right: Any) -> int:
    return shallow_size(left) + shallow_size(right)


def _product(left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
            return shallow_size(value) * max(0, times)
    _check_bits(sum(value.bit_length() for value in (left, right) if isinstance(value, int)))
    return ENTRY_SIZE


def _power(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    return ENTRY_SIZE


def _remainder(left: Any, right: Any) -> int:
    return size_of_printf(left, right) if isinstance(left, (str, bytes)) else ENTRY_SIZE


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_BITS:
        raise TemplateLimitError("counts with numbers that are too large")


OPERATORS: dict[str, Callable[[Any, Any], int]] = {"+": _sum, "*": _product, "**": _power, "%": _remainder}


# ---- formats


def size_of_printf(template: Any, values: Any) -> int:
    """Of `template % values`."""
    text = template if isinstance(template, str) else template.decode("latin-1")
    if "*" in text:  # a width from the values
        raise TemplateLimitError("pads a text to a width that it computes")
    return _size_of_filled(text, text.count("%"), values)


def size_of_format(template: str, values: Any) -> int:
    """Of `template.format(values)`."""
    if re.search(r"\{[^{}]*\{", template):  # a width from the values
        raise TemplateLimitError("pads a text to a width that it computes")
    return _size_of_filled(template, template.count("{"), values)


def _size_of_filled(template: str, num_places: int, values: Any) -> int:
    widths = [int(digits) for digits in re.findall(r"\d{1,9}", template)]
    if max(widths, default=0) > MAX_WIDTH or re.search(r"\d{10}", template):
        raise TemplateLimitError("pads a text too far")
    return len(template) + num_places * (MAX_WIDTH if widths else 0) + num_places * 2 * size_of(values, 1 << 40)


# ---- methods

PLAIN_METHODS = {
    str: frozenset(
        (
            *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii"),
            *("isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle"),
            *("isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex"),
            *("rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title"),
            "upper",
        )
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    bytes: frozenset(("decode",)),
}
"""Methods whose results are about as large as what they belong to."""


def check_method(
    budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Counts what a method of a built-in value will make; the arguments to call it with.

    Raises TemplateLimitError, also for methods that are not called here.
    """
    if any(name in names for kind, names in PLAIN_METHODS.items() if isinstance(owner, kind)):
        return args
    if not isinstance(owner, str):
        raise TemplateLimitError(f"calls {type(owner).__name__}.{name}, which templates do without")
    if name in ("center", "ljust", "rjust", "zfill"):
        budget.spend(max(len(owner), _width(args[0] if args else 0)))
    elif name == "expandtabs":
        budget.spend(len(owner) + owner.count("\t") * _width(args[0] if args else kwargs.get("tabsize", 8)))
    elif name == "replace":
        budget.spend(_size_of_replaced(owner, *args[:2]))
    elif name == "join":
        values = list(args[0])
        budget.spend(_size_of_joined(values, owner, budget.num_left))
        return (values,)
    else:
        raise TemplateLimitError(f"calls str.{name}, which templates do without")
    return args


def _width(value: Any) -> int:
    width = len(value) if isinstance(value, str) else int(value or 0)
    if width > MAX_WIDTH:
        raise TemplateLimitError("pads a text too far")
    return max(0, width)


def _size_of_replaced(text: str, old: Any = "", new: Any = "", *_: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def _size_of_joined(values: list[Any], separator: Any, most: int) -> int:
    return len(values) * len(str(separator)) + size_of(values, most)


# ---- filters: each counts what it will make and gives back its arguments

Arguments = tuple[Any, ...]
Check = Callable[[Budget, Arguments, Mapping[str, Any]], Arguments]


def _argument(args: Arguments, kwargs: Mapping[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _check_center(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    budget.spend(_as_text(budget, args[0]) + _width(_argument(args, kwargs, 1, "width", 80)))
    return args


def _check_indent(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    width = _width(_argument(args, kwargs, 1, "width", 4))
    budget.spend(_as_text(budget, args[0]) + (1 + str(args[0]).count("\n")) * width)
    return args


def _check_replace(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    _as_text(budget, args[0])
    old, new = _argument(args, kwargs, 1, "old", ""), _argument(args, kwargs, 2, "new", "")
    budget.spend(_size_of_replaced(str(args[0]), old, new))
    return args


def _check_join(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    values = list(args[0])
    budget.spend(_size_of_joined(values, _argument(args, kwargs, 1, "d", ""), budget.num_left))
    return (values, *args[1:])


def _check_format(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    budget.spend(_as_text(budget, args[0]) + size_of_printf(str(args[0]), [args[1:], kwargs]))
    return args


def _check_json(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    indent = _width(_argument(args, kwargs, 2, "indent"))
    budget.spend(2 * size_of(args[0], budget.num_left, indent=indent))
    return args


def _check_string(budget: Budget, args: Arguments, _: Mapping[str, Any]) -> Arguments:
    _as_text(budget, args[0])
    return args


def _check_sum(_: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    if not isinstance(_argument(args, kwargs, 2, "start", 0), (int, float)):
        raise TemplateLimitError("adds up what are no numbers")
    return args


def _check_count(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    """batch and slice: lists of so many places, filled up with one value."""
    count = _argument(args, kwargs, 1, "linecount", _argument(args, kwargs, 1, "slices", 1))
    filling = _argument(args, kwargs, 2, "fill_with")
    budget.spend(_width(count) * size_of(filling, budget.num_left, are_texts_shared=True))
    return args


def _check_round(_: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    if abs(_argument(args, kwargs, 1, "precision", 0)) > MAX_WIDTH // 10:
        raise TemplateLimitError("counts with numbers that are too large")
    return args


def _as_text(budget: Budget, value: Any) -> int:
    """0 for a text; anything else is counted now, for it becomes one."""
    if not isinstance(value, str):
        budget.spend(size_of(value, budget.num_left))
    return len(value) if isinstance(value, str) else 0


def _check_text(budget: Budget, args: Arguments, kwargs: Mapping[str, Any]) -> Arguments:
    return _check_string(budget, args, kwargs)


FILTERS: dict[str, Check] = (
    {
        "center": _check_center,
        "indent": _check_indent,
        "replace": _check_replace,
        "join": _check_join,
        "format": _check_format,
        "tojson": _check_json,
        "sum": _check_sum,
        "batch": _check_count,
        "slice": _check_count,
        "round": _check_round,
    }
    | dict.fromkeys(
        (
            "string",
            "lower",
            "upper",
            "title",
            "capitalize",
            "trim",
            "truncate",
            "wordcount",
            "urlencode",
            "e",
            "escape",
        ),
        _check_text,
    )
    | dict.fromkeys(("forceescape", "safe"), _check_text)
)
