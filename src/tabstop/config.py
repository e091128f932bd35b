"""Every option, once: a field of a frozen dataclass with its help and unit.

The CLI (flags), the environment (TABSTOP_<FIELD>) and docs/api.md are generated from these fields. Nothing else in the
package reads the environment. Resolution makes new objects (dataclasses.replace), it never mutates.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tabstop.errors import ConfigError

Config = TypeVar("Config")


def option(default: Any, help: str, *, unit: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that the CLI, the environment and the docs can describe."""
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit, "choices": choices})


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: a model, its device and its scheduler."""

    model: str = option("default", "folder, .gguf file, Hub id, or 'default' (the embedded SmolLM2-135M-Instruct)")
    revision: str | None = option(None, "Hub revision (branch, tag or commit)")
    offline: bool = option(False, "never contact the Hub; use only what is on disk (HF_HUB_OFFLINE is respected too)")
    tokenizer: str | None = option(None, "folder or Hub id of another tokenizer than the checkpoint's own")
    fim: str = option("auto", "fill-in-the-middle family; 'auto' finds it in the vocabulary, 'off' uses none")
    load_format: str = option("auto", "where weights come from", choices=("auto", "safetensors", "gguf", "dummy"))
    device: str = option("auto", "device to run on", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "compute type", choices=("auto", "float32", "bfloat16", "float16"))
    kv_dtype: str = option("auto", "KV cache type", choices=("auto", "float32", "bfloat16", "float16"))
    attention: str = option("auto", "attention backend; 'auto' takes the first that does not decline")
    max_model_len: int | None = option(None, "longest prompt + completion; default: the checkpoint's", unit="tokens")
    block_size: int = option(16, "KV block size", unit="tokens")
    num_kv_blocks: int | None = option(None, "size of the KV pool; default: from free memory", unit="blocks")
    kv_memory: float | None = option(None, "memory of the KV pool; default: from free memory", unit="GiB")
    gpu_memory_utilization: float = option(0.9, "share of the device's memory to use", unit="0..1")
    max_num_seqs: int = option(64, "samples that run at once", unit="sequences")
    max_num_batched_tokens: int = option(512, "token budget of one step", unit="tokens")
    max_num_waiting: int = option(1024, "requests that may wait; more are refused", unit="requests")
    prefix_cache: bool = option(True, "reuse KV blocks of common prompt starts")
    overlap: str = option(
        "auto", "plan the next step while the last one runs; 'auto' means on a GPU", choices=("auto", "on", "off")
    )
    cuda_graphs: bool = option(True, "capture decode steps as CUDA graphs")
    seed: int = option(0, "seed of dummy weights")
    num_threads: int | None = option(None, "compute threads on the CPU; default: all cores", unit="threads")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) is below --max-num-seqs "
                f"({self.max_num_seqs}): "
                "a step could not give every running sample one token; raise the first or lower the second"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError("--gpu-memory-utilization must be over 0 and at most 1")


@dataclasses.dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP side and the processes around it."""

    host: str = option("127.0.0.1", "address to bind; anything but loopback needs --api-key or --insecure")
    port: int = option(8000, "TCP port; 0 takes a free one")
    api_key: str | None = option(None, "key that clients must send; prefer the environment variable")
    insecure: bool = option(False, "allow a public address without a key")
    num_front_ends: int = option(1, "HTTP processes", unit="processes")
    served_model_name: tuple[str, ...] = option((), "name(s) under which the model is served; the first is shown")
    unknown_model: str = option("serve", "what to do with other model names", choices=("serve", "refuse"))
    max_body_bytes: int = option(8 << 20, "largest request body", unit="bytes")
    max_num_samples: int = option(32, "largest n of a request")
    max_stop_strings: int = option(64, "most stop strings of a request")
    transcode_fim: bool = option(True, "lay out raw prompts in another family's markers for the model that is served")
    token_healing: str = option(
        "off", "begin within the token that the cursor is in: never, in holes, always", choices=("off", "auto", "on")
    )
    drain_timeout: float = option(30.0, "how long SIGTERM waits for open requests", unit="seconds")
    log_level: str = option("info", "what to log", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "how to log", choices=("text", "json"))
    log_prompts: bool = option(False, "write prompts and completions into the log")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_front_ends < 1:
            raise ConfigError("--num-front-ends must be at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be 0 to 65535")
        if not self.is_loopback and not self.api_key and not self.insecure:
            raise ConfigError(
                f"refusing to bind {self.host} without a key: anyone who reaches it could use the model; "
                "set TABSTOP_API_KEY, bind 127.0.0.1, or pass --insecure"
            )

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def check_fields(config: Any) -> None:
    """Raises ConfigError for a value outside a field's choices."""
    for field in dataclasses.fields(config):
        choices = field.metadata["choices"]
        if choices and getattr(config, field.name) not in choices:
            raise ConfigError(
                f"{flag(field.name)} is {getattr(config, field.name)!r}; choose one of {', '.join(choices)}"
            )


def parse(text: str, annotation: Any) -> Any:
    """A field's value from its text (environment variable). Raises ValueError."""
    kinds = (
        [k for k in typing.get_args(annotation) if k is not types.NoneType]
        if _is_optional(annotation)
        else [annotation]
    )
    kind = kinds[0]
    if kind is bool:
        if text.lower() not in ("0", "1", "true", "false", "yes", "no"):
            raise ValueError("use 0 or 1")
        return text.lower() in ("1", "true", "yes")
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return kind(text)


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
                raise ConfigError(f"{variable} is {environment[variable]!r}: {error}") from None
    return cls(**values | {name: value for name, value in given.items() if value is not None})
