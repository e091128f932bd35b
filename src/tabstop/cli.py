"""The command `tabstop`: serve, generate, fit, version, and those of bench/cli.py and evaluation/cli.py.

Options are the fields of config.py, read from there. Knows how to print; computes nothing. Imports of torch, HTTP and
text happen inside the commands that need them. What a user got wrong is one line `error: …` on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer

import tabstop
from tabstop import config
from tabstop.config import EngineConfig, ServerConfig
from tabstop.errors import ConfigError, InputError, StartupError
from tabstop.exits import EXIT_CANNOT_START, EXIT_INTERRUPTED

MEASURING = ("bench", "cost", "plan")
"""Commands of bench/cli.py, which is imported only for them and for the list of all commands."""

EVALUATING = ("eval",)
"""The same of evaluation/cli.py."""

app = typer.Typer(
    name="tabstop",
    help="A serving engine for code models. Every option can also be set by an environment variable TABSTOP_<OPTION>.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Command = Callable[..., Any]


def describe(field: dataclasses.Field[Any]) -> str:
    """A field's help with its unit and default."""
    unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
    has_default = field.default not in (None, (), "")
    return str(field.metadata["help"]) + unit + (f" (default: {field.default})" if has_default else "")


def as_parameter(field: dataclasses.Field[Any], annotation: Any) -> inspect.Parameter:
    """The command-line parameter of a config field. None means: not given."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    kind = kinds[0] if isinstance(annotation, types.UnionType) else annotation
    names = [config.flag(field.name)]
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    elif typing.get_origin(kind) is tuple:
        kind = list[str]
    metavar = "|".join(field.metadata["choices"]) or ("NAME,…" if kind == list[str] else None)
    if kind in (int, float):  # read by as_config_value, which says more than typer where it is no number
        kind, metavar = str, f"<{kind.__name__}>"
    if field.name == "model":
        declared: Any = typer.Argument(help=describe(field), show_default=False)
    else:
        declared = typer.Option(*names, help=describe(field), metavar=metavar, show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def with_options(*classes: type[Any]) -> Callable[[Command], Command]:
    """Gives a command the options of config classes and calls it with one config of each, in that order.

    The command's own options follow as keywords. Raises ConfigError for values that a config refuses.
    """

    def decorate(command: Command) -> Command:
        hints = {cls: typing.get_type_hints(cls) for cls in classes}
        fields = {cls: [(field, hints[cls][field.name]) for field in dataclasses.fields(cls)] for cls in classes}
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(classes) :]
        generated = [as_parameter(field, hint) for cls in classes for field, hint in fields[cls]]

        def call(**given: Any) -> Any:
            configs = [
                config.from_environment(
                    cls, **{field.name: as_config_value(field, hint, given.pop(field.name)) for field, hint in known}
                )
                for cls, known in fields.items()
            ]
            return command(*configs, **given)

        parameters = sorted([*own, *generated], key=lambda parameter: parameter.name != "model")
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorate


def as_config_value(field: dataclasses.Field[Any], annotation: Any, value: Any) -> Any:
    """Lists (of repeated or comma-separated options) become tuples; an empty one means: not given. Texts are read.

    Raises ConfigError naming the option and its unit.
    """
    if isinstance(value, list):
        return tuple(part.strip() for text in value for part in text.split(",") if part.strip()) or None
    if not isinstance(value, str):
        return value
    try:
        return config.parse(value, annotation)
    except ValueError as error:
        unit = f" [{field.metadata['unit']}]" if field.metadata["unit"] else ""
        raise ConfigError(f"{config.flag(field.name)} is {value!r}; it must be {error}{unit}") from None


@app.command()
@with_options(EngineConfig, ServerConfig)
def serve(engine: EngineConfig, server: ServerConfig) -> None:
    """Serve a model over HTTP until Ctrl-C."""
    from tabstop import supervisor

    raise typer.Exit(supervisor.serve(engine, server))


@app.command()
@with_options(EngineConfig)
def generate(
    engine: EngineConfig,
    *,
    prompt: Annotated[str, typer.Option(help="what to continue; '-' reads it from stdin")],
    max_tokens: Annotated[int, typer.Option(help="longest continuation [tokens]")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens of this total probability")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the continuation; may be repeated")] = None,
) -> None:
    """Continue a prompt and print the text as it comes, without a server."""
    from tabstop.llm import LLM
    from tabstop.outputs import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=stop)
    text = sys.stdin.read() if prompt == "-" else prompt
    llm = LLM(**dataclasses.asdict(engine))
    try:
        for piece in llm.stream(text, params):
            print(piece, end="", flush=True)
        print()
    finally:  # Ctrl-C too: an engine that outlives the interpreter's threads complains
        llm.close()


@app.command()
@with_options(EngineConfig)
def fit(
    engine: EngineConfig, *, json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False
) -> None:
    """Say what of a model would fit on this machine, without loading it. Exit code 2: it would not start."""
    from rich.console import Console

    from tabstop.checkpoint import open_checkpoint
    from tabstop.fit import fit as compute
    from tabstop.startup import make_table

    checkpoint = open_checkpoint(engine.model, revision=engine.revision, offline=engine.offline)
    report = compute(checkpoint, engine)
    if json:
        print(msgspec.json.encode(report).decode())
    else:
        Console().print(make_table(report.rows(), f"{checkpoint.name} on this machine"))
    raise typer.Exit(EXIT_CANNOT_START if report.problem else 0)


@app.command()
def models(*, json: Annotated[bool, typer.Option("--json", help="print one JSON list")] = False) -> None:
    """List the model families that can be served, their forms and quirks, and what was verified."""
    from rich.console import Console
    from rich.table import Table

    from tabstop.models.catalogue import CATALOGUE

    if json:
        print(msgspec.json.encode(CATALOGUE).decode())
        return
    table = Table("family", "models", "architectures", "forms", "quirks", "verified by", show_lines=True)
    for row in CATALOGUE:
        table.add_row(
            row.family, row.models, "\n".join(row.architectures), "\n".join(row.forms), row.quirks, row.verified_by
        )
    Console().print(table)


@app.command()
def version() -> None:
    """Print the version."""
    print(tabstop.__version__)


key_app = typer.Typer(no_args_is_help=True, help="Make keys for --key-file.")
app.add_typer(key_app, name="key")


@key_app.callback()
def key_commands() -> None: ...


@key_app.command("new")
def new_key(
    *,
    name: Annotated[str, typer.Option(help="how the file, logs and people call the key")],
    scope: Annotated[
        list[str] | None, typer.Option(help="infer, admin, or infer,admin; default: infer", metavar="SCOPE,…")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="who shares cached prompts; default: the key alone")] = None,
    priority: Annotated[str, typer.Option("--class", help="best class: interactive, normal or background")] = (
        "interactive"
    ),
    rate: Annotated[str | None, typer.Option(help="requests, as 60/min or 2/s", metavar="N/min")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="requests that are open at once")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(help="tokens of prompts and completions")] = None,
    file: Annotated[str | None, typer.Option(help="key file to append to; it is made if need be")] = None,
) -> None:
    """Make a key: print it, once, and the line for the key file, or append that line to --file."""
    from tabstop import keys

    text = keys.new_key()
    fields: dict[str, Any] = {
        "name": name,
        "sha256": keys.digest_of(text).hex(),
        "scopes": keys.parse_scopes([keys.INFER] if scope is None else scope),
        "class": priority,
    }
    fields |= {"tenant": tenant, "requests_per_minute": keys.parse_rate(rate) if rate else None}
    fields |= {"max_concurrent": max_concurrent, "tokens_per_minute": tokens_per_minute}
    key = keys.make_key({name: value for name, value in fields.items() if value is not None})
    if file is not None:
        keys.append_key(file, key)
    print(text)
    if file is None:
        print(keys.line_of(key).decode(), end="")


def print_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def common_options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None: ...


def add_measuring_commands() -> None:
    """bench, cost and plan: their imports (scipy, aiohttp) take longer than all others together."""
    from tabstop.bench.cli import bench_app, cost, plan

    app.add_typer(bench_app, name="bench")
    app.command("cost")(cost)
    app.command("plan")(plan)


def add_evaluating_commands() -> None:
    from tabstop.evaluation.cli import eval_app

    app.add_typer(eval_app, name="eval")


def main(arguments: list[str] | None = None) -> None:
    """The console script. Never returns."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("--help", *MEASURING):
        add_measuring_commands()
    if not words or words[0] in ("--help", *EVALUATING):
        add_evaluating_commands()
    try:
        app(words)
    except (StartupError, InputError) as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(EXIT_CANNOT_START)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
