"""What would fit: the report equals what a load then holds, and problems are told instead of raised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.errors import CheckpointError, ConfigError
from tabstop.fit import FitReport, fit
from tests.models.oracle import load
from tests.text.fim_vocabularies import QWEN, byte_level_definition
from tests.tiny import llama_config, tiny_llama, tiny_qwen2
from tests.tiny_gguf import write_gguf


def report_of(path: Path | str, **options: object) -> FitReport:
    return fit(open_checkpoint(str(path)), EngineConfig(device="cpu", **{"dtype": "float32", **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_the_report_s_sizes_are_those_of_the_loaded_model(make: object, tmp_path: Path) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    report, model = report_of(folder), load(folder)
    assert report.weight_bytes == model.weight_bytes > 0
    assert report.kv_bytes_per_token == sum(spec.bytes_per_token(4) for spec in model.cache_specs) == 256
    assert (report.form, report.device, report.dtype, report.kv_dtype) == ("safetensors", "cpu", "float32", "float32")
    assert report.problem is None


def test_what_a_cpu_serves_by_default_takes_less(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    plain, report, model = report_of(folder), report_of(folder, dtype="auto"), load(folder, dtype="auto")
    assert report.weight_bytes == model.weight_bytes and plain.weight_bytes / 4 < report.weight_bytes
    assert report.weight_bytes < 0.4 * plain.weight_bytes and report.kv_bytes_per_token == 128
    assert (report.dtype, report.kv_dtype) == ("float32", "bfloat16")
    assert report_of(folder, dtype="auto", attention="reference").kv_dtype == "float32"


def test_how_many_requests_fit(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, max_position_embeddings=4096)
    report = report_of(folder, num_kv_blocks=1000)
    assert (report.max_model_len, report.longest_context, report.num_longest, report.num_common) == (4096, 4096, 3, 7)
    short = report_of(folder, num_kv_blocks=1000, max_model_len=100)
    assert (short.longest_context, short.num_longest, short.num_common) == (100, 142, 142)


def test_types_change_the_sizes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    plain, half = report_of(folder), report_of(folder, dtype="bfloat16")
    assert (half.weight_bytes * 2, half.kv_bytes_per_token * 2) == (plain.weight_bytes, plain.kv_bytes_per_token)
    mixed = report_of(folder, kv_dtype="bfloat16")
    assert (mixed.weight_bytes, mixed.kv_bytes_per_token, mixed.kv_dtype) == (plain.weight_bytes, 128, "bfloat16")


def test_a_problem_is_part_of_the_report(tmp_path: Path) -> None:
    report = report_of(tiny_llama(tmp_path), num_kv_blocks=10)
    assert report.problem is not None and "one request of 512 tokens" in report.problem
    assert (report.longest_context, report.num_longest) == (160, 1)
    assert report.rows()["problem"] == report.problem


def test_a_checkpoint_that_could_not_be_loaded_fails_here_too(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        report_of(folder)
    assert report_of(folder, load_format="dummy").form == "dummy"
    with pytest.raises(ConfigError, match="--max-model-len is 513"):
        report_of(folder, load_format="dummy", max_model_len=513)


def test_a_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", llama_config(), "Q8_0").path
    report = report_of(path)
    assert report.form == "gguf" and report.weight_bytes == load(path).weight_bytes


def test_rows_for_people() -> None:
    rows = report_of("default", num_kv_blocks=1024).rows()
    assert rows["model"] == "SmolLM2-135M-Instruct (LlamaForCausalLM, gguf)"
    assert rows["weights"].startswith("0.50 GiB of ")
    assert rows["KV cache"] == "1,024 blocks of 16 = 16,384 tokens, 0.70 GiB (46,080 bytes a token)"
    assert rows["longest context"] == "8,192 tokens"
    assert rows["requests of that length that fit"] == "2 (at most 64 run at once)"
    assert rows["requests of 2,048 tokens that fit"] == "8"
    assert rows["fill-in-the-middle"] == "none: prefixes are continued"


def test_the_family_that_fills_holes(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_definition(QWEN)), encoding="utf-8")
    assert report_of(folder).fim == "qwen" and report_of(folder, fim="off").fim is None
    with pytest.raises(ConfigError, match="--fim mellum needs tokens that this vocabulary lacks"):
        report_of(folder, fim="mellum")
