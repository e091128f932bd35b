"""The Jinja environment that chat templates run in: what transformers gives them, with bounds on time and memory.

A template comes from a checkpoint: it may loop for ever, double a text forty times or ask for 10⁹ blanks. Everything
that makes values is counted against a `Budget` before it is made: operators, calls, filters, literals, slices, joined
output. Every turn of a loop and every call looks at the clock of its thread. What nothing but harm needs is left out.
Knows no messages and no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from tabstop.text import sandbox_bounds as bounds
from tabstop.text.sandbox_bounds import Budget, TemplateLimitError, size_of

LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat template needs and that take quadratic time or make answers that change."""


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What rendering one conversation may cost. What the conversation itself holds is allowed for on top."""

    num_characters: int = 16 << 20  # made on the way, not only those of the result
    seconds: float = 2.0  # of a thread's processor time

    def budget(self, num_given: int) -> Budget:
        """For a conversation of so many characters."""
        return Budget(self.num_characters + 64 * num_given, self.seconds + num_given * 1e-6)


_budget: ContextVar[Budget] = ContextVar("budget")
"""Of the rendering that goes on in this thread."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders templates. Rendering raises jinja2.TemplateError and what wrong data raise."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})
    concat = staticmethod(lambda pieces: _joined(pieces))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock], finalize=_shown
        )
        self.filters |= {"tojson": _to_json}
        self.filters |= dict.fromkeys(LEFT_OUT, _left_out)
        self.filters = {name: _metered(name, function) for name, function in self.filters.items()}
        self.filters |= {_CONCAT: _concat, _LITERAL: _literal, _SLICED: _sliced, _TICK: _tick}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"dict": _TemplateDict(), "namespace": _TemplateNamespace}
        del self.globals["lipsum"]

    @contextmanager
    def spending(self, budget: Budget) -> Iterator[None]:
        """Counts what this thread renders or compiles."""
        token = _budget.set(budget)
        try:
            yield
        finally:
            _budget.reset(token)

    def render(self, template: jinja2.Template, variables: Mapping[str, Any], limits: RenderLimits) -> str:
        """The text. Raises TemplateLimitError beside what templates raise."""
        budget = limits.budget(size_of(variables, 1 << 60))
        with self.spending(budget):
            return template.render(variables)

    # ---- what Jinja calls

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _instrumented(super()._parse(source, name, filename))

    def compile_template(self, source: str) -> jinja2.Template:
        """Raises jinja2.TemplateError and what too large or too deep sources raise."""
        with self.spending(Budget(16 << 20, 10.0)):  # constants are computed here
            return self.from_string(source)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _budget.get().spend(bounds.OPERATORS[operator](left, right))
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        owner = getattr(__obj, "__self__", None)
        if not isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
            return super().call(__context, __obj, *args, **kwargs)
        args = bounds.check_method(budget, owner, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(bounds.shallow_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _budget.get().spend(bounds.size_of_format(template, [args, kwargs]))
            return wrapped(*args, **kwargs)

        return bounded


# ---- the template, rewritten so that it counts

_TICK, _CONCAT, _LITERAL, _SLICED = "\0tick", "\0concat", "\0literal", "\0sliced"
"""Names that no template can write."""


def _instrumented(tree: nodes.Template) -> nodes.Template:
    """Loops tick; joined texts, literals and slices, which Jinja makes without asking, become filters."""
    for loop in tree.find_all(nodes.For):
        tick = nodes.Filter(nodes.Const(None), _TICK, [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
    _replace_below(tree)
    return tree.set_environment(tree.environment)  # type: ignore[arg-type, return-value]


def _replace_below(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            _replace_below(value)
            setattr(node, field, _replaced(value))
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, nodes.Node):
                    _replace_below(entry)
                    value[index] = _replaced(entry)


def _replaced(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Concat):
        name = _CONCAT
        node = nodes.List(node.nodes)
    elif isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        name = _LITERAL
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        name = _SLICED
    else:
        return node
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


@jinja2.pass_context
def _tick(*_: Any) -> None:
    """That it wants the context keeps it from being computed when the template is compiled."""
    _budget.get().tick()


def _concat(values: list[Any]) -> str:
    budget = _budget.get()
    for value in values:
        budget.spend(len(value) if isinstance(value, str) else size_of(value, budget.num_left))
    return "".join(map(str, values))


def _literal(value: Any) -> Any:
    """Counted with all that it holds: nothing grows by holding itself twice, again and again."""
    budget = _budget.get()
    budget.spend(size_of(value, budget.num_left, are_texts_shared=True))
    return value


def _sliced(value: Any) -> Any:
    _budget.get().spend(bounds.shallow_size(value))
    return value


def _joined(pieces: Iterable[str]) -> str:
    """Output: the template's own text and `_shown` values."""
    budget, kept = _budget.get(), []
    for piece in pieces:
        budget.spend(len(piece))
        kept.append(piece)
    return "".join(kept)


def _shown(value: Any) -> Any:
    """A value about to become text."""
    if isinstance(value, str):
        return value
    budget = _budget.get()
    budget.spend(size_of(value, budget.num_left))
    return value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts what it makes, before or after."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or a context comes before the value
    check = bounds.FILTERS.get(name)

    def metered(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        passed, given = args[:first], args[first:]
        if check is not None:
            given = check(budget, given, kwargs)
        result = function(*passed, *given, **kwargs)
        if isinstance(result, Iterator):
            return _ticking(result)
        budget.spend(
            len(result) if isinstance(result, str) else size_of(result, budget.num_left, are_texts_shared=True)
        )
        return result

    metered.__dict__ |= function.__dict__ if hasattr(function, "__dict__") else {}
    return metered


def _ticking(values: Iterator[Any]) -> Iterator[Any]:
    tick = _budget.get().tick
    for value in values:
        tick()
        yield value


# ---- what templates find


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` tells trainers what the model wrote; here it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateDict:
    """`dict(…)` and `dict.fromkeys`, as transformers gives them: the class itself stays out of reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return _literal(dict(*args, **kwargs))  # type: ignore[no-any-return]

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return _literal(dict.fromkeys(keys, value))  # type: ignore[no-any-return]


class _TemplateNamespace(Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given = dict(*args[1:], **kwargs)
        if any(str(name).startswith("_") for name in given):
            raise SecurityError("a namespace has a name that begins with an underscore")
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError("a namespace has a name that begins with an underscore")
        super().__setitem__(name, value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _left_out(*_: Any, **__: Any) -> None:
    raise SecurityError(f"filters that templates do without: {', '.join(LEFT_OUT)}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > bounds.MAX_WIDTH:
        raise TemplateLimitError("asks for a date in too many words")
    return datetime.now().strftime(form)
