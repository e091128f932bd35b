"""The command line: every option comes from config.py, errors are one line and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tabstop
from tabstop import cli, config
from tabstop.config import EngineConfig, ServerConfig
from tabstop.errors import ConfigError
from tabstop.models import FAMILIES
from tests.tiny import tiny_llama

HOME = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, "-m", "tabstop", *arguments]
    inherited = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    return subprocess.run(
        command,
        env=HOME | inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_help_shows_every_option_with_its_help() -> None:
    shown = " ".join(run("serve", "--help").stdout.split())
    for cls in (EngineConfig, ServerConfig):
        for field in dataclasses.fields(cls):
            assert field.name == "model" or config.flag(field.name) in shown
            assert field.metadata["help"] in shown
            assert "|".join(field.metadata["choices"]) in shown


def test_all_commands_are_listed() -> None:
    shown = run("--help").stdout
    for command in ("serve", "generate", "fit", "version", *cli.MEASURING, *cli.EVALUATING):
        assert f"\n  {command} " in shown
    assert "compare" in run("bench", "--help").stdout


def test_version() -> None:
    assert run("version").stdout == run("--version").stdout == f"{tabstop.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["serve", "--device", "tpu"], {}, "--device is 'tpu'; choose one of auto, cpu, cuda"),
        (["serve", "--host", "0.0.0.0"], {}, "refusing to bind 0.0.0.0 without a key"),
        (["serve", "--port", "eighty"], {}, "--port is 'eighty'; it must be a whole number"),
        (["serve", "--kv-memory", "300MiB"], {}, "--kv-memory is '300MiB'; it must be a number [GiB]"),
        (["serve"], {"TABSTOP_PORT": "eighty"}, "TABSTOP_PORT is 'eighty'; it must be a whole number"),
        (["serve"], {"TABSTOP_PORT": "70000"}, "--port is 70000; it must be 0 to 65535"),
        (["serve", "--num-front-ends", "0"], {}, "--num-front-ends is 0; it must be 1 to 256"),
        (["serve", "/nonexistent/model"], {}, "/nonexistent/model"),
        (["fit", "/nonexistent/model"], {}, "/nonexistent/model"),
    ],
)
def test_what_cannot_start_is_one_line_and_exit_code_2(
    arguments: list[str], environment: dict[str, str], message: str
) -> None:
    result = run(*arguments, **environment)
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_wrong_option_is_exit_code_2() -> None:
    assert run("serve", "--no-such-option").returncode == 2
    assert run("serve", "a", "b").returncode == 2


def given(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[EngineConfig, ServerConfig]:
    """The configs that `serve` gets from a command line."""
    seen: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr("tabstop.supervisor.serve", lambda *configs: seen.append(configs) or 0)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", *arguments])
    assert exit_.value.code == 0
    return seen[0]


def test_options_reach_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, server = given(
        monkeypatch,
        *("some/model", "--max-model-len", "512", "--no-prefix-cache", "--kv-memory", "1.5", "--port", "0"),
        *("--served-model-name", "a,b", "--served-model-name", "c", "--insecure"),
    )
    assert engine == EngineConfig(model="some/model", max_model_len=512, prefix_cache=False, kv_memory=1.5)
    assert server == ServerConfig(port=0, served_model_name=("a", "b", "c"), insecure=True)


def test_the_command_line_is_over_the_environment_is_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TABSTOP_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("TABSTOP_BLOCK_SIZE", "32")
    monkeypatch.setenv("TABSTOP_API_KEY", "k")
    engine, server = given(monkeypatch, "--block-size", "8")
    assert (engine.max_num_seqs, engine.block_size, engine.model) == (5, 8, "default")
    assert server.api_key == "k"


def test_the_exit_code_of_the_server_is_the_command_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tabstop.supervisor.serve", lambda *configs: 70)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve"])
    assert exit_.value.code == 70


def test_ctrl_c_before_the_server_is_up_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*configs: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("tabstop.supervisor.serve", interrupted)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve"])
    assert exit_.value.code == 130


def test_fit_as_table_and_as_json(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path))
    table = run("fit", model, "--num-kv-blocks", "100", "--max-model-len", "256")
    assert table.returncode == 0 and "100 blocks of 16 = 1,600 tokens" in table.stdout
    report = json.loads(run("fit", model, "--json", "--num-kv-blocks", "100", "--max-model-len", "256").stdout)
    assert report["num_blocks"] == 100 and report["num_longest"] == 6 and report["problem"] is None
    too_small = run("fit", model, "--json", "--num-kv-blocks", "10", "--max-model-len", "256")
    assert too_small.returncode == 2 and "256 tokens" in json.loads(too_small.stdout)["problem"]


def test_generate_prints_a_continuation(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path))
    options = ("--max-model-len", "256", "--num-kv-blocks", "64", "--max-tokens", "5")
    result = run("generate", model, "--prompt", "def f(x):", *options)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 1
    assert run("generate", model, "--prompt", "def f(x):", *options).stdout == result.stdout
    refused = run("generate", model, "--prompt", "x " * 300, *options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ") and "256" in refused.stderr


def test_config_errors_name_the_variable() -> None:
    with pytest.raises(ConfigError, match="TABSTOP_KV_MEMORY is 'much'"):
        config.from_environment(EngineConfig, {"TABSTOP_KV_MEMORY": "much"})


def test_models_lists_every_family_that_is_registered() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert {name for row in rows for name in row["architectures"]} == set(FAMILIES)
    assert all(name in run("models").stdout for name in ("Starcoder2ForCausalLM", "safetensors"))


def test_an_interrupted_continuation_ends_without_a_complaint(tmp_path):
    model = str(tiny_llama(tmp_path, max_position_embeddings=8192, eos_token_id=[]))
    command = [sys.executable, "-m", "tabstop", "generate", model, "--prompt", "x", "--max-tokens", "8000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, b"")


@pytest.mark.parametrize(
    ("cls", "name", "values", "allowed"),
    [
        (EngineConfig, "num_threads", (0, -1), "1 to 4096"),
        (EngineConfig, "kv_memory", (0.0, -1.0, math.nan, math.inf), "0.001 to 1000000"),
        (EngineConfig, "gpu_memory_utilization", (0.0, 1.1, math.nan), "0.001 to 1"),
        (EngineConfig, "num_kv_blocks", (0,), "at least 1"),
        (EngineConfig, "block_size", (0, 1025), "1 to 1024"),
        (EngineConfig, "max_model_len", (0,), "at least 1"),
        (EngineConfig, "max_num_seqs", (0, "x"), "at least 1"),
        (EngineConfig, "max_num_batched_tokens", (0,), "at least 1"),
        (EngineConfig, "max_num_waiting", (0,), "at least 1"),
        (ServerConfig, "port", (-1, 65536), "0 to 65535"),
        (ServerConfig, "num_front_ends", (0,), "1 to 256"),
        (ServerConfig, "max_body_bytes", (1023,), "at least 1024"),
        (ServerConfig, "max_num_samples", (0,), "at least 1"),
        (ServerConfig, "max_stop_strings", (-1,), "at least 0"),
        (ServerConfig, "drain_timeout", (-1.0, math.nan, math.inf), "0 to 86400"),
    ],
)
def test_numbers_out_of_range_name_the_flag_and_what_is_allowed(
    cls: type[Any], name: str, values: tuple[Any, ...], allowed: str
) -> None:
    for value in values:
        message = f"{config.flag(name)} is {value!r}; it must be {allowed}"
        with pytest.raises(ConfigError, match=re.escape(message) + "$"):
            cls(**{name: value})


@pytest.mark.parametrize("key", ["", "  ", " s3cret", "s3cret\n", "k\x00y", "schlüssel", "k\udcffy"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="API key") as caught:
        ServerConfig(api_key=key)
    assert "s3cret" not in caught.value.message
