"""Big, sharded, half-written and lying files: bounded memory, and one clear error each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import CheckpointError, StartupError, UnsupportedModelError
from tabstop.models.file_reader import read_bytes
from tabstop.models.source import open_source
from tests.models.families import VARIANTS, write_variant
from tests.models.oracle import load
from tests.tiny import llama_config, tiny_llama, write_checkpoint
from tests.tiny_gguf import write_gguf

ROOT = Path(__file__).parents[2]
BIG: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "head_dim": 256}
"""About 190 MB of float32."""
ALLOWED = 1.2


def split(folder: Path, num_shards: int) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{index % num_shards}.safetensors" for index, name in enumerate(weights)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def measure(tiny: Path, path: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.models.load_and_measure", str(tiny), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found: dict[str, int] = json.loads(result.stdout)
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("form", ["shards", "gguf"])
def test_loading_takes_little_more_than_the_weights(form: str, tmp_path: Path) -> None:
    tiny = tiny_llama(tmp_path / "tiny")
    if form == "gguf":
        path = write_gguf(tmp_path / "big.gguf", llama_config(**BIG)).path
    else:
        path = write_checkpoint(tmp_path / "big", llama_config(**BIG))
        split(path, 4)
    found = measure(tiny, path)
    share = found["rise"] / found["weights"]
    print(f"{form}: {found['weights'] / 1e6:.0f} MB of weights, memory rose by {share:.3f} of that")
    assert found["weights"] > 150e6
    assert 0.9 < share <= ALLOWED


def test_every_shard_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    split(folder, 3)
    path = folder / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"model-2\.safetensors is damaged or truncated: tensor model\..* would end"
    ):
        load(folder)


def test_an_index_of_another_form_and_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    split(folder, 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    extra = load_file(folder / "model-0.safetensors")
    save_file(extra, folder / "model-2.safetensors")
    content["weight_map"]["another"] = "model-2.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tensor \S+ lies in two files: model-0.* and model-2"):
        load(folder)
    index.write_text('{"weight_map": {"model.norm.weight": 3}}')
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map is .*; names of files are known"):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    source = open_source(open_checkpoint(str(folder)), "safetensors")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends before byte \d+: it was cut"):
        read_bytes(path, 0, path.stat().st_size + 1)
    assert "model.norm.weight" in source.tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 8}, r"q_proj\.weight has the shape \(32, 32\); config\.json calls for \(64, 32\)"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight has the shape \(16, 32\); config\.json calls for \(8, 32\)"),
        ({"head_dim": 16}, r"q_proj\.weight has the shape \(32, 32\); config\.json calls for \(64, 32\)"),
        ({"num_hidden_layers": 3}, r"lacks 9 tensors: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"holds 9 tensors: model\.layers\.1\."),
        ({"intermediate_size": 63}, r"gate_proj\.weight has the shape \(64, 32\); config\.json calls for \(63, 32\)"),
        ({"vocab_size": 7}, r"embed_tokens\.weight has the shape \(\d+, 32\); config\.json calls for \(7, 32\)"),
        ({"attention_bias": True}, r"lacks 8 tensors: .*q_proj\.bias"),
    ],
)
def test_a_config_that_lies_fails_with_the_tensor_s_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps(llama_config(**change)))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["gpt-bigcode", "gpt-neox", "codegen", "phi3", "starcoder2", "glm4"])
def test_lies_about_packed_heads_fail_with_the_tensor_s_name(name: str, tmp_path: Path) -> None:
    folder = write_variant(tmp_path, VARIANTS[name])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    hidden = "n_embd" if "n_embd" in config else "hidden_size"
    path.write_text(json.dumps(config | {hidden: 2 * config[hidden]}))
    with pytest.raises(CheckpointError, match=r"tensor \S+ has the shape \(\d+.*; config\.json calls for"):
        load(folder)


def test_wrong_types_are_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for name, wrong in {"model.norm.weight": torch.int32, "model.embed_tokens.weight": torch.bool}.items():
        save_file(weights | {name: weights[name].to(wrong)}, folder / "model.safetensors")
        with pytest.raises(UnsupportedModelError, match=rf"tensor {name} is stored as \w+; readable here: BF16, F16"):
            load(folder)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_in_the_head_of_a_file_is_an_error_or_nothing(seed: int, tmp_path: Path) -> None:
    """Whatever is wrong, it is one of our errors; most flips are in names or numbers that are compared."""
    folder = tiny_llama(tmp_path, num_hidden_layers=1)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    place = torch.Generator().manual_seed(seed)
    at = int(torch.randint(8 + int.from_bytes(data[:8], "little"), (1,), generator=place))
    data[at] ^= 1 << int(torch.randint(8, (1,), generator=place))
    path.write_bytes(data)
    try:
        model = load(folder)
    except StartupError as error:
        assert error.message
    else:
        assert model.weight_bytes > 0
