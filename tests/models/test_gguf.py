"""GGUF files against float checkpoints of the same weights: every type, the order of rotary rows, scaling, mixtures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import UnsupportedModelError
from tabstop.models.gguf_source import GGUFSource
from tabstop.quant import TensorRead
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.tiny import VOCAB_SIZE, llama_config, qwen2_config, write_checkpoint
from tests.tiny_gguf import TinyGGUF, write_gguf

BLOCKWISE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SUPERBLOCKS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
PROMPT = [(7 * index) % VOCAB_SIZE for index in range(40)]


def write_pair(folder: Path, config: dict[str, Any], encoding: str = "F32", **metadata: Any) -> tuple[Path, TinyGGUF]:
    """(folder with the float weights that the file decodes to, the file)."""
    file = write_gguf(folder / "model.gguf", config, encoding, **metadata)
    floats = write_checkpoint(
        folder / "floats", {key: value for key, value in config.items() if key != "rope_divisors"}
    )
    save_file(file.weights, floats / "model.safetensors", metadata={"format": "pt"})
    return floats, file


@pytest.mark.parametrize("encoding", BLOCKWISE + SUPERBLOCKS)
def test_every_type_computes_as_its_decoded_weights_in_the_oracle(encoding: str, tmp_path: Path) -> None:
    size = 256 if encoding in SUPERBLOCKS else 32
    config = llama_config(hidden_size=size, intermediate_size=2 * size, num_hidden_layers=1, head_dim=size // 4)
    floats, file = write_pair(tmp_path, config, encoding)
    (expected,) = oracle_logits(floats, [PROMPT])
    logits = PagedRunner(load(file.path)).logits(PROMPT)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(llama_config(num_key_value_heads=1), id="llama-mqa"),
        pytest.param(llama_config(attention_bias=True, mlp_bias=True), id="llama-biases"),
        pytest.param(llama_config(tie_word_embeddings=True, rope_theta=300.0), id="llama-tied"),
        pytest.param(llama_config(head_dim=10), id="llama-head-dim"),
        pytest.param(qwen2_config(), id="qwen2"),
        pytest.param(qwen2_config(tie_word_embeddings=False), id="qwen2-untied"),
    ],
)
def test_rotary_rows_and_biases_come_in_the_hub_s_order(config: dict[str, Any], tmp_path: Path) -> None:
    floats, file = write_pair(tmp_path, config)
    (expected,) = oracle_logits(floats, [PROMPT])
    torch.testing.assert_close(PagedRunner(load(file.path)).logits(PROMPT), expected, rtol=0, atol=1e-5)


def test_precomputed_llama3_divisors_equal_the_oracle_s_scaling(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    config = llama_config(head_dim=16, rope_scaling=scaling)
    floats, file = write_pair(tmp_path, config | {"rope_divisors": llama3_divisors(config)})
    (expected,) = oracle_logits(floats, [PROMPT])
    torch.testing.assert_close(PagedRunner(load(file.path)).logits(PROMPT), expected, rtol=0, atol=1e-5)


def llama3_divisors(config: dict[str, Any]) -> list[float]:
    """What a converter writes into rope_freqs.weight, after the published rule."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    context, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for pair in range(dim // 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (2 * pair / dim)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(scaling["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    assert len({round(divisor, 6) for divisor in divisors}) >= 3  # all three cases occur
    return divisors


def test_linear_scaling_in_metadata(tmp_path: Path) -> None:
    config = llama_config(rope_scaling={"rope_type": "linear", "factor": 4.0})
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    floats, file = write_pair(tmp_path, config, **keys)
    (expected,) = oracle_logits(floats, [PROMPT])
    torch.testing.assert_close(PagedRunner(load(file.path)).logits(PROMPT), expected, rtol=0, atol=1e-5)


def test_other_scaling_and_partial_rotation_are_refused(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "other.gguf", llama_config(), **{"llama.rope.scaling.type": "other"})
    with pytest.raises(UnsupportedModelError, match=r"rope_type is 'other'; known: 'default', 'linear', 'dynamic'"):
        load(other.path)
    partial = write_gguf(tmp_path / "partial.gguf", llama_config(), **{"llama.rope.dimension_count": 4})
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor is 0.5"):
        load(partial.path)


def test_one_fused_matrix_may_mix_types(tmp_path: Path) -> None:
    """q in Q8_0, k in F16, v in Q4_1: the fused projection is the three decoded matrices under each other."""
    config = llama_config(num_hidden_layers=1)
    file = write_gguf(tmp_path / "model.gguf", config)
    kinds = {"q_proj": "Q8_0", "k_proj": "F16", "v_proj": "Q4_1"}
    mixed = rewrite(file, tmp_path / "mixed.gguf", {f".attn_{name[0]}.": kind for name, kind in kinds.items()})
    model = load(mixed)
    decoded = []
    for name, kind in kinds.items():
        rows = file.weights[f"model.layers.0.self_attn.{name}.weight"].numpy()
        kind_of = gguf.GGMLQuantizationType[kind]
        decoded.append(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, kind_of), kind_of)))
    assert torch.equal(model.blocks[0].attention.qkv.weight.matrix, torch.cat(decoded))  # type: ignore[attr-defined]


def rewrite(file: TinyGGUF, path: Path, kinds: dict[str, str]) -> Path:
    """The same F32 file with some tensors (by a part of their name) in other types."""
    reader = gguf.GGUFReader(file.path)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            sub_type = value.types[1] if len(value.types) > 1 else None
            writer.add_key_value(key, value.contents(), value.types[0], sub_type)
    for tensor in reader.tensors:
        kind = next((kind for part, kind in kinds.items() if part in tensor.name), "F32")
        kind_of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor.name, gguf.quants.quantize(np.array(tensor.data), kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("encoding", ["F32", "Q8_0"])
def test_slices_of_packed_tensors_are_slices_of_their_values(encoding: str, tmp_path: Path) -> None:
    from tabstop.quant.gguf import dequantize

    file = write_gguf(tmp_path / "model.gguf", llama_config(num_hidden_layers=1), encoding)
    source = GGUFSource(open_checkpoint(str(file.path)).gguf_header)
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.0.{part}.weight"
        whole = file.weights[name]
        columns = slice(0, 32) if part.endswith("q_proj") else slice(32, 64)
        read = TensorRead(name, tuple(whole.shape), (slice(3, 17), columns))
        assert torch.equal(dequantize(source.read(read)), whole[3:17, columns])


def test_a_split_inside_a_block_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama_config(), "Q8_0")
    source = GGUFSource(open_checkpoint(str(file.path)).gguf_header)
    read = TensorRead("model.layers.0.mlp.down_proj.weight", (32, 64), (slice(0, 32), slice(16, 48)))
    with pytest.raises(UnsupportedModelError, match=r"columns 16 to 48 of model\.layers\.0.*Q8_0 blocks of 32"):
        source.read(read)
