"""Strict both ways, by name; shards, ignored tensors, dummy weights, progress, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.errors import CheckpointError, ConfigError, MemoryShortageError, UnsupportedModelError
from tabstop.models.loader import load_model
from tests.models.oracle import load
from tests.models.paged import PagedRunner
from tests.tiny import llama_config, random_weights, tiny_llama, tiny_qwen2
from tests.tiny_gguf import write_gguf

PROMPT = list(range(30))


def edit_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of model.safetensors."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    edit_weights(folder, {"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    edit_weights(folder, {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(CheckpointError, match=r"holds 1 tensor: model\.layers\.0\.self_attn\.q_norm\.weight"):
        load(folder)


def test_a_bias_that_the_config_does_not_call_for_is_not_dropped(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(CheckpointError, match=r"holds 6 tensors: .*self_attn\.k_proj\.bias.* and 1 more"):
        load(folder)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    edit_weights(folder, {"model.norm.weight": torch.ones(33)})
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight has the shape \(33,\); config\.json calls for \(32,\)"
    ):
        load(folder)


def test_tensors_that_every_llama_may_carry_are_ignored(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    expected = PagedRunner(load(folder)).logits(PROMPT)
    copy = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    edit_weights(folder, {"lm_head.weight": copy, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert torch.equal(PagedRunner(load(folder)).logits(PROMPT), expected)


def write_shards(folder: Path, num_shards: int) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{index % num_shards}.safetensors" for index, name in enumerate(weights)}
    for shard in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_shards_load_as_one_file(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    expected = PagedRunner(load(folder)).logits(PROMPT)
    write_shards(folder, 3)
    assert torch.equal(PagedRunner(load(folder)).logits(PROMPT), expected)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-1\.safetensors, which its index names"):
        load(folder)


def test_an_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names a file outside the folder: \.\./elsewhere\.safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load_into_float32(dtype: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, torch_dtype=dtype)
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in random_weights(llama_config()).items()}
    model: Any = load(folder)
    expected = rounded["model.layers.0.mlp.down_proj.weight"].float()
    assert torch.equal(model.blocks[0].mlp.down.weight.matrix, expected)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_packed_values_in_a_plain_checkpoint_are_refused(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    edit_weights(folder, {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 32).to(dtype)})
    with pytest.raises(UnsupportedModelError, match=rf"up_proj\.weight is stored as {name}; readable here: BF16, F16"):
        load(folder)


def test_a_pickle_only_folder_is_refused_without_opening_the_file(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo pickled'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle file.*safetensors or GGUF"):
        load(folder)


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights \(\*\.safetensors\).*--load-format dummy"):
        load(folder)


@pytest.mark.parametrize("kept", [3, 200, 0.5, 0.999])
def test_truncated_safetensors_are_named(kept: float, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        load(folder)


def test_dummy_weights_need_only_a_config_and_depend_on_the_seed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    for name in ("model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    first = PagedRunner(load(folder, load_format="dummy")).logits(PROMPT)
    assert torch.isfinite(first).all() and first.std() > 0
    assert torch.equal(PagedRunner(load(folder, load_format="dummy")).logits(PROMPT), first)
    assert not torch.equal(PagedRunner(load(folder, load_format="dummy", seed=1)).logits(PROMPT), first)


def test_load_format_must_match_the_checkpoint(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama_config())
    with pytest.raises(ConfigError, match=r"--load-format is 'safetensors', but .* is a gguf checkpoint; use 'auto'"):
        load(file.path, load_format="safetensors")
    assert load(file.path, load_format="gguf").vocab_size == load(file.path).vocab_size


def test_progress_counts_the_stored_bytes_once(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    seen: list[tuple[str, int, int]] = []
    checkpoint = open_checkpoint(str(folder))
    load_model(checkpoint, EngineConfig(), torch.device("cpu"), torch.float32, lambda *event: seen.append(event))
    done = [each[1] for each in seen]
    assert {stage for stage, _, _ in seen} == {"weights"}
    assert done == sorted(done) and done[-1] == seen[-1][2] == sum(
        tensor.numel() * 4 for tensor in load_file(folder / "model.safetensors").values()
    )


def test_weights_that_cannot_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    huge = llama_config(hidden_size=1 << 20, intermediate_size=1 << 22, vocab_size=1 << 20, num_hidden_layers=1000)
    (folder / "config.json").write_text(json.dumps(huge))
    with pytest.raises(MemoryShortageError, match=r"the weights need [\d.]+ GiB but [\d.]+ GiB are free"):
        load(folder, load_format="dummy")
