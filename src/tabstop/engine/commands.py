"""What a client may ask the engine to do beside generating: name → handler over the core.

The engine process adds the commands that concern its clients (join, front_end_gone, drain); everything else is here, so
that InprocClient and the process run the same handlers. A new command is one function and one line in COMMANDS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from tabstop.errors import InputError, NotSupportedError
from tabstop.types import CachePolicy, Command, Limits, Sampling, Submit, pack_ids

if TYPE_CHECKING:
    from tabstop.engine.process import Core

Handler = Callable[["Core", Mapping[str, Any], float], Any]
"""(core, arguments, now in seconds) → a JSON-able result. Raises errors.InputError for bad arguments."""

ENGINE_ITSELF = 0xFFFF_FFFF
"""In the place of a front end's number in the ids of requests that no client waits for."""

_own_counter = itertools.count()


def get_argument(arguments: Mapping[str, Any], name: str, kind: Any) -> Any:
    """A named argument, checked against its type. Raises InputError."""
    if name not in arguments:
        raise InputError(f"the command needs the argument {name!r}", param=name)
    try:
        return msgspec.convert(arguments[name], kind)
    except msgspec.ValidationError as error:
        raise InputError(f"argument {name!r}: {error}", param=name) from None


def dump_ledger(core: Core, arguments: Mapping[str, Any], now: float) -> Any:
    """Where every token slot of the KV pool is."""
    return msgspec.to_builtins(core.stats().ledger)


def dump_stats(core: Core, arguments: Mapping[str, Any], now: float) -> Any:
    return msgspec.to_builtins(core.stats())


def warm(core: Core, arguments: Mapping[str, Any], now: float) -> int:
    """Starts to compute a prompt whose blocks the prefix cache then keeps; returns its length in tokens."""
    ids = get_argument(arguments, "token_ids", list[int])
    if not all(0 <= token_id < core.info.vocab_size for token_id in ids):
        raise InputError(f"token_ids must lie between 0 and {core.info.vocab_size - 1}", param="token_ids")
    if not 0 < len(ids) <= core.info.max_model_len:  # nobody reads the request's own refusal
        raise InputError(f"token_ids must be 1 to {core.info.max_model_len}, not {len(ids)}", param="token_ids")
    scope = get_argument({"scope": "", **arguments}, "scope", str)
    submit = Submit(
        request_id=(ENGINE_ITSELF, next(_own_counter)),
        prompt_ids=pack_ids(ids),
        sampling=Sampling(temperature=0.0),
        limits=Limits(max_tokens=0, stop_sets=()),
        cache=CachePolicy(scope=scope),
    )
    core.add(submit, now)
    return len(ids)


def reserved(core: Core, arguments: Mapping[str, Any], now: float) -> None:
    """A name kept for a later version."""
    raise NotSupportedError("this command is reserved; this version does not have it")


COMMANDS: dict[str, Handler] = {
    "ledger": dump_ledger,
    "stats": dump_stats,
    "warm": warm,
    "pin": reserved,
    "drop": reserved,
}


def run_command(core: Core, command: Command, now: float) -> Any:
    """Runs a registered command and returns its result. Raises InputError for a wrong name or argument."""
    if command.name not in COMMANDS:
        raise InputError(f"unknown command {command.name!r}; known: {', '.join(sorted(COMMANDS))}")
    return COMMANDS[command.name](core, command.arguments, now)
