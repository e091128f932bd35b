"""The command line's options, once: fields of a dataclass, and how they become a run's setup.

Knows typer and the setup's types; runs nothing.
"""
# ruff: noqa: RUF009

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import secrets
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import typer

from tabstop.bench.client import Endpoint
from tabstop.bench.dialects import Sampling
from tabstop.bench.metrics import Slo
from tabstop.bench.run import LoadSpec, RunSetup, Tokenization
from tabstop.bench.workloads import NAMES, WorkloadSpec
from tabstop.config import from_environment, option
from tabstop.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of run, compare and sweep."""

    dialect: str = option("auto", "auto, openai-completions, openai-chat, tgi or llama-cpp")
    model: str = option("", "model name to ask for; default: the first that the server lists")
    header: list[str] | None = option(None, "extra header, 'Name: value'; may be repeated")
    extra: list[str] | None = option(
        None, "further fields of every request body, as JSON; compare takes one for all or one for each endpoint"
    )
    temperature: float = option(0.0, "sampling temperature; 0 is greedy")
    timeout: float = option(600.0, "a request without an end after this many seconds has failed")
    workload: str = option("random", f"one of {', '.join(NAMES)}")
    num_requests: int = option(200, "requests (sessions, for chat, agent and typing)")
    input: str = option("128", "prompt tokens: 128, 100:500, 128,512 or lognormal:1469:1.1")
    output: str = option("64", "output tokens, written like --input")
    allow_end: bool = option(False, "let answers end early (default: ask for exactly --output tokens)")
    folder: Path | None = option(None, "source files for fim and typing")
    fim_template: str = option("", "fim as text: a template with {prefix} and {suffix}; default: the suffix field")
    trace: str = option("azure-code", "trace to replay: azure-code or a CSV of time, input, output tokens")
    trace_speed: float = option(1.0, "2 replays twice as fast")
    trace_skip: int = option(0, "rows of the trace to skip")
    max_input: int | None = option(None, "cut a trace's longer prompts to so many tokens")
    turns: int = option(4, "turns of a chat or agent session")
    think_time: float = option(1.0, "mean pause between chat turns in seconds; scales an agent's pauses")
    live_answers: bool = option(False, "chat: send the server's own answers back (default: scripted ones)")
    prefixes: int = option(4, "shared prefixes, or an agent's repositories")
    prefix_tokens: int = option(1024, "tokens of a shared prefix or system prompt (agent: 32000 is life size)")
    cancel_rate: float = option(0.0, "share of requests that the client gives up")
    cancel_after: float = option(0.2, "mean seconds until it does")
    verbatim: bool = option(False, "humaneval, fim: do not make repeated prompts unique")
    seed: int | None = option(None, "seed of prompts and schedule; default: a new one, written into the report")
    concurrency: int | None = option(None, "closed loop: requests in flight (default 8)")
    ramp: float = option(0.0, "closed loop: start the slots over so many seconds")
    rest: float = option(0.0, "closed loop: mean think time in seconds between two requests of a slot")
    rate: float | None = option(None, "open loop: requests a second, whatever the server does")
    arrivals: str = option("poisson", "open loop: constant, poisson or gamma")
    shape: float = option(0.5, "gamma arrivals: shape; under 1 is burstier than Poisson")
    duration: float | None = option(None, "send nothing new after so many seconds")
    warm_up: float = option(0.0, "seconds at the start that do not count")
    warm_up_requests: int = option(4, "requests before the run, with prompts of their own")
    prompt_form: str = option("auto", "auto, ids or text")
    tokenizer: Path | None = option(None, "tokenizer.json (or its folder) to make and count tokens with")
    vocabulary: int = option(30_000, "random ids stay below this")
    stream: bool = option(True, "stream the answers; without it only their ends are seen: no TTFT, no token times")
    running_usage: bool = option(True, "ask for the token count in every chunk")
    slo: str = option("", "limits in seconds, e.g. ttft=0.5,tpot=0.05,e2e=5,itl_max=0.2")
    workers: int = option(2, "client processes")
    max_lag: float | None = option(
        None, "client p99 lag in seconds that makes a run INVALID; default: p99 5 %, p50 1 % of TTFT"
    )
    gpu: str = option("", "hardware facts for sanity checks: a100-80gb, 2xh100-80gb or name:GB/s:TFLOPS:GB")
    model_config: Path | None = option(None, "config.json of the model, for sanity checks")
    weight_bytes: float = option(2.0, "bytes a parameter (2: 16 bits, 0.56: 4 bits and scales)")
    price: str = option("", "4.10/gpu-hour or 32.77/hour, for the report's cost curve; default: for each $1 an hour")
    devices: int = option(1, "devices that the server holds, for --price in gpu-hours")
    out: Path | None = option(None, "folder of the report; default: bench-<kind>-<time>")
    keep_text: bool = option(False, "keep prompts' answers in requests.jsonl")


@dataclasses.dataclass(frozen=True, slots=True)
class Credentials:
    """What comes from the environment: TABSTOP_BENCH_API_KEY is sent as a bearer token."""

    bench_api_key: str | None = option(None, "key that the measured server wants")


def with_options(cls: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a typer command every field of `cls` as an option; the command gets them as one object, `options`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(cls)
        fields = dataclasses.fields(cls)
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields}
            function(options=cls(**given), **values)

        added = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(field.default, help=field.metadata["help"]),
                annotation=hints[field.name],
            )
            for field in fields
        ]
        function_hints = typing.get_type_hints(function, include_extras=True)
        own_hints = {p.name: function_hints[p.name] for p in own}
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[p.name]) for p in own]
        command.__signature__ = inspect.Signature([*parameters, *added])  # type: ignore[attr-defined]
        command.__annotations__ = own_hints | {field.name: hints[field.name] for field in fields}
        return command

    return decorate


LEAST = {  # option → its least value; a float only for a bound that must itself be exceeded
    **dict.fromkeys(("num_requests", "concurrency", "workers", "turns", "prefixes", "max_input", "devices"), 1),
    **dict.fromkeys(("seed", "trace_skip", "prefix_tokens", "ramp", "rest", "warm_up", "warm_up_requests"), 0),
    **dict.fromkeys(("temperature", "think_time", "cancel_rate", "max_lag"), 0),
    **dict.fromkeys(("timeout", "trace_speed", "cancel_after", "shape", "duration", "weight_bytes"), 0.0),
    "vocabulary": 2,
}


def check_number(name: str, value: float, least: float) -> None:
    """Raises ConfigError for an option that is no number, or under `least` (0.0: not over it)."""
    is_open = isinstance(least, float)
    if not math.isfinite(value) or value < least or (is_open and value == least):
        limit = f"{'over' if is_open else 'at least'} {least:g}"
        raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be a number, {limit}")


def make_setup(options: Options) -> RunSetup:
    """Raises ConfigError for contradicting or unreadable options."""
    if options.rate is not None and options.concurrency is not None:
        raise ConfigError("--rate is an open loop, --concurrency a closed one: give only one of them")
    for name, least in LEAST.items():
        if (value := getattr(options, name)) is not None:
            check_number(name, value, least)
    slo, _ = parse_slo(options.slo)
    if slo is not None and not options.stream and (slo.ttft, slo.tpot, slo.itl_max) != (None, None, None):
        raise ConfigError(
            "--no-stream shows only the ends of answers: --slo can limit e2e, but not ttft, tpot, itl_max"
        )
    return RunSetup(
        workload=_workload(options),
        load=_load(options),
        tokens=Tokenization(form=_form(options.prompt_form), tokenizer=options.tokenizer, num_ids=options.vocabulary),
        slo=slo,
        warm_up=options.warm_up,
        warm_up_requests=options.warm_up_requests,
        max_lag=options.max_lag,
    )


def _form(written: str) -> typing.Literal["auto", "ids", "text"]:
    try:
        form: typing.Literal["auto", "ids", "text"] = msgspec.convert(written, typing.Literal["auto", "ids", "text"])
        return form
    except msgspec.ValidationError:
        raise ConfigError(f"--prompt-form is {written!r}; choose auto, ids or text") from None


def _workload(options: Options) -> WorkloadSpec:
    return WorkloadSpec(
        name=options.workload,
        num_requests=options.num_requests,
        input_tokens=options.input,
        output_tokens=options.output,
        ignore_end=not options.allow_end,
        folder=options.folder,
        fim_template=options.fim_template,
        trace=options.trace,
        trace_speed=options.trace_speed,
        trace_skip=options.trace_skip,
        max_input_tokens=options.max_input,
        num_turns=options.turns,
        think_time=options.think_time,
        live_answers=options.live_answers,
        num_prefixes=options.prefixes,
        prefix_tokens=options.prefix_tokens,
        cancel_rate=options.cancel_rate,
        cancel_after=options.cancel_after,
        verbatim=options.verbatim,
        seed=options.seed if options.seed is not None else secrets.randbelow(2**31),
    )


def _load(options: Options) -> LoadSpec:
    if options.rate is not None:
        return LoadSpec(
            mode="open",
            process=options.arrivals,
            rate=options.rate,
            shape=options.shape,
            duration=options.duration,
        )
    if options.workload == "trace" and options.concurrency is None:
        return LoadSpec(mode="replay", duration=options.duration)
    return LoadSpec(
        mode="closed",
        concurrency=options.concurrency or 8,
        ramp=options.ramp,
        rest=options.rest,
        duration=options.duration,
    )


def make_endpoint(options: Options, url: str, label: str = "", number: int = 0) -> Endpoint:
    """The endpoint that is the command's `number`th. Raises ConfigError for an unreadable header or body."""
    headers = {}
    for written in options.header or []:
        name, colon, value = written.partition(":")
        if not colon:
            raise ConfigError(f"--header {written!r} has no colon; write 'Name: value'")
        headers[name.strip()] = value.strip()
    if key := from_environment(Credentials).bench_api_key:
        headers.setdefault("Authorization", f"Bearer {key}")
    sampling = Sampling(
        model=options.model,
        temperature=options.temperature,
        stream=options.stream,
        running_usage=options.running_usage,
        extra=_extra(options, number),
    )
    if "://" not in url:
        url = "http://" + url
    _check_url(url)
    return Endpoint(
        url=url,
        dialect=options.dialect,
        sampling=sampling,
        headers=headers,
        timeout=options.timeout,
        label=label,
    )


def _check_url(url: str) -> None:
    """Raises ConfigError for what is no URL of an HTTP server."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port out of range
        is_good, parts = False, urlsplit("")
    if parts.username is not None:
        raise ConfigError("the address holds a password, which the report would keep: send it with --header instead")
    if not is_good:
        raise ConfigError(f"{url!r} is no address of an HTTP server; write http://HOST:PORT")


def check_extras(options: Options, num_endpoints: int) -> None:
    """Raises ConfigError unless --extra was given for none, for all, or for each."""
    num = len(options.extra or [])
    if num not in (0, 1, num_endpoints):
        raise ConfigError(
            f"--extra was given {num} times for {num_endpoints} endpoints: give one for all or one for each"
        )


def _extra(options: Options, number: int) -> dict[str, Any]:
    given = options.extra or ["{}"]
    try:
        return msgspec.json.decode(given[number if len(given) > 1 else 0], type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra is not a JSON object: {error}") from None


def parse_slo(written: str) -> tuple[Slo | None, float | None]:
    """ "ttft=0.5,tpot_p95=0.05" → limits, and the percentile if one is named. Raises ConfigError."""
    limits: dict[str, float] = {}
    levels = set()
    for part in filter(None, (part.strip() for part in written.split(","))):
        name, _, value = part.partition("=")
        if "_p" in name:
            name, _, level = name.rpartition("_p")
            levels.add(level)
        try:
            limits[name] = float(value.removesuffix("s"))
            if name not in Slo.__struct_fields__ or not 0 < limits[name] < math.inf:
                raise ValueError
        except ValueError:
            known = ", ".join(Slo.__struct_fields__)
            raise ConfigError(f"cannot read {part!r} of --slo; write NAME=SECONDS with one of {known}") from None
    if len(levels) > 1:
        raise ConfigError(
            f"--slo names several percentiles ({', '.join(sorted(levels))}); a request is good or not: name one"
        )
    try:
        share = float(levels.pop()) / 100 if levels else None
    except ValueError:
        share = math.nan
    if share is not None and not 0 < share < 1:
        raise ConfigError("--slo: a percentile lies between 0 and 100, e.g. ttft_p99=0.5")
    return (Slo(**limits) if limits else None), share
