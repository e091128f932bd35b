"""Mistral's own form: params.json, consolidated*.safetensors, tekken.json; the same model as the Hub's form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import CheckpointError, UnsupportedModelError
from tabstop.models.source import tensor_infos
from tests.models.families import GROWING, THETA, VARIANTS, VOCAB_SIZE, Variant, sizes, write_variant
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.models.test_families import assert_same_logits, random_prompts
from tests.tiny_gguf import to_pairs

MODULES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def own_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight → layers.0.attention.wq.weight"""
    stem, _, kind = name.rpartition(".")
    if stem in MODULES:
        return f"{MODULES[stem]}.{kind}"
    return ".".join(MODULES.get(part, part) for part in name.removeprefix("model.").split("."))


def consolidate(folder: Path, *, num_files: int = 1, **more: Any) -> Path:
    """The folder's checkpoint in Mistral's own form, beside it."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights: dict[str, np.ndarray] = {}
    for name, array in load_file(folder / "model.safetensors").items():
        count = next((count for part, count in heads.items() if part in name), None)
        weights[own_name(name)] = np.ascontiguousarray(array if count is None else to_pairs(array, count))
    target = folder.parent / "own"
    target.mkdir()
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "vocab_size": config["vocab_size"],
        "tied_embeddings": config["tie_word_embeddings"],
        "max_seq_len": config["max_position_embeddings"],
    }
    (target / "params.json").write_text(json.dumps(params | more))
    if num_files == 1:
        save_file(weights, target / "consolidated.safetensors")
        return target
    places = {name: f"consolidated-{index % num_files}.safetensors" for index, name in enumerate(weights)}
    for place in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == place}, target / place)
    (target / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return target


@pytest.mark.parametrize(
    ("name", "num_files", "more"),
    [("mistral", 1, {}), ("mistral", 3, {}), ("mistral-window", 1, {"sliding_window": 7})],
)
def test_the_logits_are_those_of_the_hub_s_form(
    name: str, num_files: int, more: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_variant(tmp_path / "hub", VARIANTS[name])
    own = consolidate(folder, num_files=num_files, **more)
    prompts = random_prompts(name, 70)
    assert_same_logits(PagedRunner(load(own)), prompts, oracle_logits(folder, prompts))


def test_a_folder_with_both_configs_is_read_by_its_weights(tmp_path: Path) -> None:
    """Some repositories hold config.json beside params.json, but weights in one form only."""
    folder = write_variant(tmp_path / "hub", VARIANTS["mistral"])
    own = consolidate(folder)
    (expected,) = oracle_logits(folder, [[5, 6, 7, 8]])
    (own / "config.json").write_text((folder / "config.json").read_text())
    assert open_checkpoint(str(own)).is_consolidated
    torch.testing.assert_close(PagedRunner(load(own)).logits([5, 6, 7, 8]), expected, rtol=0, atol=1e-5)
    save_file(load_file(folder / "model.safetensors"), own / "model.safetensors")
    assert not open_checkpoint(str(own)).is_consolidated
    torch.testing.assert_close(PagedRunner(load(own)).logits([5, 6, 7, 8]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("apply_scale", [True, False])
def test_yarn_with_and_without_its_magnitude(apply_scale: bool, tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "beta": 16.0, "alpha": 2.0}
    rope = (
        THETA | {"rope_type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0} | {key: yarn[key] for key in list(yarn)[:2]}
    )
    rope |= {} if apply_scale else {"attention_factor": 1.0}
    folder = write_variant(tmp_path / "hub", Variant("mistral", sizes(sliding_window=None, rope_parameters=rope)))
    own = consolidate(folder, yarn=yarn | {"apply_scale": apply_scale})
    prompts = random_prompts("yarn", 70)
    assert_same_logits(PagedRunner(load(own)), prompts, oracle_logits(folder, prompts))


def test_queries_that_grow_with_their_position(tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "hub", Variant("ministral3", sizes(head_dim=8, rope_parameters=GROWING)))
    yarn = {"factor": 8.0, "original_max_position_embeddings": 16, "beta": 32.0, "alpha": 1.0, "apply_scale": False}
    scaling = {"original_max_position_embeddings": 16, "beta": 0.3}
    own = consolidate(folder, yarn=yarn, llama_4_scaling=scaling)
    prompts = random_prompts("growing", 70)
    assert_same_logits(PagedRunner(load(own)), prompts, oracle_logits(folder, prompts))


def test_the_table_of_tensors_has_the_hub_s_names_and_no_images(tmp_path: Path) -> None:
    own = consolidate(write_variant(tmp_path / "hub", VARIANTS["mistral"]), vision_encoder={"hidden_size": 4})
    weights = load_file(own / "consolidated.safetensors")
    save_file(weights | {"vision_encoder.ln_pre.weight": np.ones(4)}, own / "consolidated.safetensors")
    infos = tensor_infos(open_checkpoint(str(own)))
    assert infos["model.embed_tokens.weight"].shape == (VOCAB_SIZE, 32)
    assert len(infos) == len(weights) and all(re.match(r"model\.|lm_head", name) for name in infos)
    assert torch.isfinite(PagedRunner(load(own)).logits([3, 4, 5])).all()


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    own = consolidate(write_variant(tmp_path / "hub", VARIANTS["mistral"]), moe={"num_experts": 8})
    with pytest.raises(
        UnsupportedModelError, match=r"params\.json: moe is \{'num_experts': 8\}; this part of Mistral's"
    ):
        load(own)
    (own / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*params\.json"):
        load(own)


def test_a_repository_of_the_hub_may_have_this_form_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = consolidate(write_variant(tmp_path / "hub", VARIANTS["mistral"]))
    repository = tmp_path / "cache" / "models--owner--own-form"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    own.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint("owner/own-form", offline=True)
    assert checkpoint.is_consolidated and checkpoint.eos_token_ids == (2,)
    assert len(tensor_infos(checkpoint)) == 21
