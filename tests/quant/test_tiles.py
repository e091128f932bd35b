"""Tiles against their twins: packing every encoding, and products of any shape."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tabstop.kernels.cpu.library import Threads, refuse
from tabstop.kernels.cpu.memory import Arena
from tabstop.quant import StoredTensor
from tabstop.quant.encodings import ENCODINGS
from tabstop.quant.gguf import dequantize
from tabstop.quant.tiles import (
    EXACT,
    Format,
    TileWeight,
    format_of,
    multiply_torch,
    rounded_inputs,
    unpacked,
)
from tests.models.oracle import load
from tests.tiny import llama_config
from tests.tiny_gguf import SCALE_OFFSETS, random_blocks, write_gguf

if reason := refuse():
    pytest.skip(reason, allow_module_level=True)

KEPT = {"Q4_0": 0.0, "Q4_1": 0.0, "Q5_0": 0.0, "Q5_1": 0.0, "Q8_0": 0.0, "Q4_K": 2e-3, "Q5_K": 2e-3}
"""Encoding → largest relative error of a matrix whose integers are kept; others are rounded to 8 bits."""
FORMATS = [Format(bits, has_minima) for bits in (4, 5, 8) for has_minima in (False, True)]


def stored(encoding: str, rows: int, columns: int, seed: int = 0) -> StoredTensor:
    """Random blocks or floats."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(np.float32) * 0.05
    if encoding in ("F32", "F16", "BF16", "F64"):
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[encoding]
        return StoredTensor(ENCODINGS[encoding], torch.from_numpy(values).to(kind))
    if encoding in SCALE_OFFSETS:
        return StoredTensor(ENCODINGS[encoding], torch.from_numpy(random_blocks((rows, columns), encoding, rng)))
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[encoding])
    return StoredTensor(ENCODINGS[encoding], torch.from_numpy(blocks))


def random_weight(form: Format, rows: int, columns: int, has_halves: bool = False) -> TileWeight:
    """Tiles of random bytes with moderate scales."""
    weight = TileWeight((rows, columns), form, Arena(), has_halves)
    generator = torch.Generator().manual_seed(rows + columns)
    weight.tiles.copy_(torch.randint(0, 256, weight.tiles.shape, generator=generator, dtype=torch.uint8))
    factors = weight.tiles.view(-1, form.tile_bytes)[:, form.bits * 64 :]
    values = torch.randn(factors.shape[0], factors.shape[1] // 2, generator=generator) * 0.01
    factors.copy_(values.half().view(torch.uint8))
    return weight


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-20))


@pytest.mark.parametrize("encoding", list(ENCODINGS))
@pytest.mark.parametrize("rows", [16, 37])
def test_packing_keeps_a_block_s_integers(encoding: str, rows: int) -> None:
    blocks = stored(encoding, rows, 512)
    weight = TileWeight((rows, 512), format_of([encoding]), Arena())
    weight.fill(0, blocks)
    expected = dequantize(blocks).float()
    assert error(unpacked(weight), expected) <= KEPT.get(encoding, 7e-3)
    assert (encoding in KEPT) == (encoding in EXACT)
    assert torch.equal(weight.gather(torch.tensor([rows - 1, 0, 3])), unpacked(weight)[[rows - 1, 0, 3]])


def test_rows_come_in_windows_and_columns_need_no_whole_group() -> None:
    blocks = stored("BF16", 50, 45)
    whole, parts = (TileWeight((50, 45), format_of(["BF16"]), Arena()) for _ in range(2))
    whole.fill(0, blocks)
    for first, last in ((0, 3), (3, 20), (20, 50)):
        parts.fill(first, blocks._replace(data=blocks.data[first:last]))
    assert torch.equal(whole.tiles, parts.tiles) and error(unpacked(whole), blocks.data.float()) < 5e-3


@pytest.mark.parametrize(
    "encodings", [("Q5_0", "Q8_0"), ("Q4_0", "Q4_1"), ("Q4_0", "Q5_0"), ("Q4_1", "Q8_0"), ("Q5_1", "Q4_K")]
)
def test_parts_of_several_encodings_share_a_format(encodings: tuple[str, str]) -> None:
    parts = [stored(encoding, 32, 256, seed) for seed, encoding in enumerate(encodings)]
    weight = TileWeight((64, 256), format_of(encodings), Arena())
    for index, part in enumerate(parts):
        weight.fill(32 * index, part)
    assert error(unpacked(weight), torch.cat([dequantize(part) for part in parts])) < 2e-3


def test_a_group_of_zeros_and_a_group_of_small_numbers() -> None:
    values = torch.zeros(16, 64)
    values[:, 32:] = torch.linspace(-1e-4, 1e-4, 32)
    weight = TileWeight((16, 64), format_of(["F32"]), Arena())
    weight.fill(0, StoredTensor(ENCODINGS["F32"], values))
    assert torch.equal(unpacked(weight)[:, :32], values[:, :32]) and error(unpacked(weight), values) < 5e-2
    assert torch.equal(weight.multiply(torch.zeros(3, 64), None), torch.zeros(3, 16))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}{'m' * form.has_minima}")
def test_products_of_random_shapes_equal_the_twin_s(form: Format) -> None:
    rng = random.Random(form.tile_bytes)
    shapes = [(rng.randint(1, 200), rng.randint(1, 300), rng.choice((1, 2, 3, rng.randint(1, 600)))) for _ in range(12)]
    for rows, columns, count in [*shapes, (17, 33, 600), (1, 1, 1), (64, 96, 16), (64, 96, 17)]:
        weight = random_weight(form, rows, columns)
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
        x[count // 2] = 0
        bias = torch.randn(rows) if rows % 2 else None
        assert error(weight.multiply(x, bias), multiply_torch(weight, x, bias)) < 2e-6


@pytest.mark.parametrize("has_halves", [False, True])
@pytest.mark.parametrize("half", [32, 64, 96, 17])
def test_gated_products_equal_the_twin_s(half: int, has_halves: bool) -> None:
    for form in FORMATS:
        weight, bias = random_weight(form, 2 * half, 70, has_halves), torch.randn(2 * half)
        for count in (1, 5, 40):
            x = torch.randn(count, 70)
            gate, up = multiply_torch(weight, x, bias).chunk(2, dim=-1)
            assert error(weight.multiply_gated(x, bias), torch.nn.functional.silu(gate) * up) < 5e-6


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}{'m' * form.has_minima}")
def test_a_row_does_not_depend_on_its_batch_nor_on_threads(form: Format) -> None:
    """To the last bit."""
    weight, x = random_weight(form, 100, 200), torch.randn(40, 200)
    alone = torch.cat([weight.multiply(row[None], None) for row in x])
    before = Threads.count
    try:
        for Threads.count in (1, 2, 3):
            for count in (1, 2, 3, 5, 8, 11, 16, 17, 40):
                assert torch.equal(weight.multiply(x[:count], None), alone[:count])
    finally:
        Threads.count = before


def test_inputs_are_rounded_group_by_group() -> None:
    x = torch.randn(5, 100) * torch.logspace(-3, 3, 100)
    assert error(rounded_inputs(x), x) < 0.01
    assert (rounded_inputs(x)[:, :32] - x[:, :32]).norm() / x[:, :32].norm() < 0.01


@pytest.mark.parametrize("encoding", ["Q4_1", "Q8_0", "F16"])
def test_a_file_loads_into_tiles(encoding: str, tmp_path: Path) -> None:
    """Rows in the file's order, fused matrices, the embedding."""
    written = write_gguf(tmp_path / "model.gguf", llama_config(), encoding)
    model: Any = load(written.path, dtype="auto")
    assert model.weights.startswith("u4" if encoding == "Q4_1" else "u8")
    weights, limit = written.weights, 7e-3 if encoding == "F16" else 1e-6
    prefix = "model.layers.1.self_attn"
    qkv = torch.cat([weights[f"{prefix}.{name}_proj.weight"] for name in "qkv"])
    assert error(unpacked(model.blocks[1].attention.qkv.weight), qkv) <= limit
    gate_up = torch.cat([weights[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert error(unpacked(model.blocks[1].mlp.gate_up.weight), gate_up) <= limit
    assert error(unpacked(model.embedding.weight), weights["model.embed_tokens.weight"]) <= limit


def test_memory_in_large_pieces() -> None:
    arena = Arena()
    first, second = arena.take(100), arena.take(1000)
    assert second.data_ptr() - first.data_ptr() == 128 and second.data_ptr() % 64 == 0
    assert len(arena.take(200 << 20)) == 200 << 20 and not second.any()
