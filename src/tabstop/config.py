"""Every option, once: a field of a frozen dataclass with its help and unit.

The CLI (flags), the environment (TABSTOP_<FIELD>) and docs/api.md are generated from these fields. Nothing else in the
package reads the environment. Resolution makes new objects (dataclasses.replace), it never mutates.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tabstop.errors import ConfigError

Config = TypeVar("Config")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that the CLI, the environment and the docs can describe.

    metadata: unit (text), choices (texts), minimum and maximum (both allowed themselves).
    """
    described = {"help": help, "unit": "", "choices": (), "minimum": None, "maximum": None}
    assert metadata.keys() <= described.keys()
    return dataclasses.field(default=default, metadata=described | metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: a model, its device and its scheduler."""

    model: str = option("default", "folder, .gguf file, Hub id, or 'default' (the embedded SmolLM2-135M-Instruct)")
    revision: str | None = option(None, "Hub revision (branch, tag or commit)")
    offline: bool = option(False, "never contact the Hub; use only what is on disk (HF_HUB_OFFLINE is respected too)")
    tokenizer: str | None = option(None, "folder or Hub id of another tokenizer than the checkpoint's own")
    fim: str = option("auto", "fill-in-the-middle family; 'auto' finds it in the vocabulary, 'off' uses none")
    reasoning: str = option(
        "auto",
        "how a thinking model's reasoning is told from its answer: 'auto' finds it in the chat template, 'off', or "
        "think, mistral, seed, granite",
    )
    tool_format: str = option(
        "auto", "how the model writes calls of tools; 'auto' asks its chat template, 'off' refuses tools"
    )
    load_format: str = option("auto", "where weights come from", choices=("auto", "safetensors", "gguf", "dummy"))
    device: str = option("auto", "device to run on", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute type; on a CPU 'auto' keeps weights as small integers, any other decodes them",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kv_dtype: str = option("auto", "KV cache type", choices=("auto", "float32", "bfloat16", "float16"))
    attention: str = option("auto", "attention backend; 'auto' takes the first that does not decline")
    max_model_len: int | None = option(
        None, "longest prompt + completion; default: the checkpoint's", unit="tokens", minimum=1
    )
    block_size: int = option(16, "KV block size", unit="tokens", minimum=1, maximum=1024)
    num_kv_blocks: int | None = option(None, "size of the KV pool; default: from free memory", unit="blocks", minimum=1)
    kv_memory: float | None = option(
        None, "memory of the KV pool; default: from free memory", unit="GiB", minimum=0.001, maximum=1_000_000
    )
    gpu_memory_utilization: float = option(
        0.9, "share of the device's memory to use", unit="0..1", minimum=0.001, maximum=1
    )
    max_num_seqs: int | None = option(
        None, "samples that run at once; default: 64 on the CPU, 256 or 1024 on a GPU", unit="sequences", minimum=1
    )
    max_num_batched_tokens: int | None = option(
        None, "token budget of one step; default: 512 on the CPU, 2048 on a GPU", unit="tokens", minimum=1
    )
    max_num_waiting: int = option(1024, "requests that may wait; more are refused", unit="requests", minimum=1)
    prefix_cache: bool = option(True, "reuse KV blocks of common prompt starts")
    overlap: str = option(
        "auto", "plan the next step while the last one runs; 'auto' means on a GPU", choices=("auto", "on", "off")
    )
    cuda_graphs: bool = option(True, "capture decode steps as CUDA graphs")
    max_grammar_bytes: int = option(
        64 << 10, "largest JSON schema, regular expression, list of choices or grammar", unit="bytes", minimum=1
    )
    max_grammar_depth: int = option(
        64, "objects and lists nested in a JSON schema", unit="levels", minimum=1, maximum=120
    )
    grammar_timeout: float = option(
        5.0, "how long a grammar may take to compile", unit="seconds", minimum=0.001, maximum=3600
    )
    grammar_step_timeout: float = option(
        0.1, "what a grammar may take for one token, in a thread's time", unit="seconds", minimum=0.001, maximum=60
    )
    num_cached_grammars: int = option(128, "compiled grammars that are kept", unit="grammars", minimum=1)
    seed: int = option(0, "seed of dummy weights")
    num_threads: int | None = option(
        None, "compute threads on the CPU; default: all cores", unit="threads", minimum=1, maximum=4096
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_num_batched_tokens and self.max_num_seqs and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) is below --max-num-seqs "
                f"({self.max_num_seqs}): "
                "a step could not give every running sample one token; raise the first or lower the second"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP side and the processes around it."""

    host: str = option("127.0.0.1", "address to bind; anything but loopback needs keys or --insecure")
    port: int = option(8000, "TCP port; 0 takes a free one", minimum=0, maximum=65535)
    api_key: str | None = option(None, "key that clients must send; prefer the environment variable")
    key_file: str | None = option(None, "file of hashed keys (`tabstop key new`); SIGHUP reads it again")
    insecure: bool = option(False, "allow a public address without a key")
    num_front_ends: int | None = option(
        None, "HTTP processes; default: 1, from 8 cores on 4", unit="processes", minimum=1, maximum=256
    )
    served_model_name: tuple[str, ...] = option((), "name(s) under which the model is served; the first is shown")
    unknown_model: str = option("serve", "what to do with other model names", choices=("serve", "refuse"))
    max_body_bytes: int = option(8 << 20, "largest request body", unit="bytes", minimum=1024)
    max_header_bytes: int = option(64 << 10, "largest path and headers of a request", unit="bytes", minimum=1024)
    max_num_headers: int = option(128, "most headers of a request", unit="headers", minimum=8)
    header_timeout: float = option(
        10.0, "how long a client may take to send its headers", unit="seconds", minimum=0.1, maximum=3600
    )
    body_timeout: float = option(
        60.0, "how long a client may take to send its body", unit="seconds", minimum=0.1, maximum=86_400
    )
    send_timeout: float = option(
        60.0, "how long a client may leave its answer unread", unit="seconds", minimum=0.1, maximum=86_400
    )
    max_connections_per_address: int | None = option(
        None,
        "connections that one address may have to a front end; default: no limit, since a proxy has them all",
        unit="connections",
        minimum=1,
    )
    max_open_requests: int = option(
        4096, "requests that a front end has open at once; more are refused", unit="requests", minimum=1
    )
    max_num_samples: int = option(32, "largest n of a request", minimum=1)
    max_stop_strings: int = option(64, "most stop strings of a request", minimum=0)
    max_logit_biases: int = option(1024, "most tokens in logit_bias", unit="tokens", minimum=0, maximum=1024)
    max_prompt_tokens: int | None = option(
        None, "longest prompt; default: what the context holds", unit="tokens", minimum=1
    )
    max_request_tokens: int = option(
        1 << 20, "all prompts of a request and max_tokens of all of its samples together", unit="tokens", minimum=1
    )
    max_queue_age: float = option(
        600.0, "how long a request may wait before it is begun", unit="seconds", minimum=0.001, maximum=86_400
    )
    transcode_fim: bool = option(True, "lay out raw prompts in another family's markers for the model that is served")
    token_healing: str = option(
        "auto", "begin within the token that the cursor is in: never, in holes, always", choices=("off", "auto", "on")
    )
    drain_timeout: float = option(
        30.0, "how long SIGTERM waits for open requests", unit="seconds", minimum=0, maximum=86_400
    )
    engine_timeout: float = option(
        30.0,
        "an engine or a front end that is silent for so long is dead: frozen or deadlocked",
        unit="seconds",
        minimum=2,
        maximum=3600,
    )
    log_level: str = option("info", "what to log", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "how to log", choices=("text", "json"))
    log_prompts: bool = option(False, "write prompts and completions into the log")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.api_key is not None and not _is_sendable(self.api_key):
            raise ConfigError(
                "the API key is empty, begins or ends with a blank, or has other than printable ASCII characters, so "
                "no client could send it; choose another one, or leave it out to need none"
            )
        if not self.is_loopback and not self.needs_key and not self.insecure:
            raise ConfigError(
                f"refusing to bind {self.host} without a key: anyone who reaches it could use the model; "
                "set TABSTOP_API_KEY or --key-file, bind 127.0.0.1, or pass --insecure"
            )

    @property
    def needs_key(self) -> bool:
        """Also with an empty key file: then nobody gets in."""
        return self.api_key is not None or self.key_file is not None

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def check_fields(config: Any) -> None:
    """Raises ConfigError for a value outside a field's choices or bounds."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{flag(field.name)} is {value!r}; choose one of {', '.join(choices)}")
        minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
        if minimum is None or (value is None and field.default is None):
            continue
        highest = math.inf if maximum is None else maximum
        if not isinstance(value, int | float) or not minimum <= value <= highest:  # NaN is in no range
            allowed = f"at least {minimum}" if maximum is None else f"{minimum} to {maximum}"
            raise ConfigError(f"{flag(field.name)} is {value!r}; it must be {allowed}")


def _is_sendable(key: str) -> bool:
    """Whether a header can carry a key and a server reads it back the same."""
    return bool(key) and key == key.strip() and key.isascii() and key.isprintable()


def parse(text: str, annotation: Any) -> Any:
    """A field's value from its text (environment variable). Raises ValueError that says what is allowed."""
    kinds = (
        [k for k in typing.get_args(annotation) if k is not types.NoneType]
        if _is_optional(annotation)
        else [annotation]
    )
    kind = kinds[0]
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
            raise ValueError("0 or 1")
        return text.lower() in ("1", "true", "yes")
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return kind(text)
    except ValueError:
        raise ValueError("a whole number" if kind is int else "a number") from None


def _is_optional(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) and types.NoneType in typing.get_args(annotation)


def from_environment(cls: type[Config], environment: Mapping[str, str] = os.environ, **given: Any) -> Config:
    """A config from TABSTOP_* variables, overridden by the `given` values that are not None.

    Raises ConfigError, naming the variable, for a value that does not parse.
    """
    values: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(cls).items():
        variable = "TABSTOP_" + name.upper()
        if variable in environment:
            try:
                values[name] = parse(environment[variable], annotation)
            except ValueError as error:
                raise ConfigError(f"{variable} is {environment[variable]!r}; it must be {error}") from None
    return cls(**values | {name: value for name, value in given.items() if value is not None})


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the server's own processes inherit: no secret that they do not need, since it can be read there."""
    secrets = ("TABSTOP_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return {name: value for name, value in environment.items() if name not in secrets}


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user keeps what can be made again (XDG_CACHE_HOME, else ~/.cache). Raises FileNotFoundError."""
    base = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "tabstop"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder; set HOME or XDG_CACHE_HOME") from None
