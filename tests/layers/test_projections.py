"""Where rows of heads lie: every way to pack them, and every share of a rank, against plain indexing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tabstop.errors import UnsupportedModelError
from tabstop.layers import SINGLE, Shard
from tabstop.layers.attention import Attention, AttentionConfig
from tabstop.layers.mlp import StackedGatedMLP
from tabstop.layers.projections import Projections, grouped, head_by_head, rotary_order, separate, stacked
from tabstop.models.safetensors_source import SafetensorsSource
from tabstop.quant import Loading, MatrixPart, Placement, make_scheme

HIDDEN, HEADS, DIM = 16, 4, 6


def loading_of(folder: Path, weights: dict[str, torch.Tensor]) -> Loading:
    save_file(weights, folder / "model.safetensors")
    return Loading(make_scheme("dense"), SafetensorsSource(folder).read, torch.device("cpu"), torch.float32)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_runs_and_order_are_plain_indexing(data: st.DataObject) -> None:
    unit, count = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    places = data.draw(st.permutations(range(2 * count)))[:count]
    order = data.draw(st.none() | st.permutations(range(unit)).map(tuple))
    placement = Placement(2 * count * unit, unit, tuple(place * unit for place in places), order)
    step = 1 if order is None else unit
    first = data.draw(st.integers(0, unit * count // step - 1)) * step
    last = data.draw(st.integers(first // step + 1, unit * count // step)) * step
    part = MatrixPart("a", (placement.num_rows, 3), slice(first, last), slice(0, 3), placement)
    stored = random(placement.num_rows, 3)
    expected = [
        stored[places[row // unit] * unit + (order[row % unit] if order else row % unit)] for row in range(first, last)
    ]
    read = torch.cat([stored[run] for run in part.runs])
    assert torch.equal(part.arranged(read), torch.stack(expected))


@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(6, False), (6, True), (4, False), (4, True), (2, True)])
def test_pairs_come_half_a_head_apart(rotary_dim: int, interleaved: bool) -> None:
    order = rotary_order(DIM, rotary_dim, interleaved) or tuple(range(DIM))
    assert sorted(order) == list(range(DIM))
    for pair in range(rotary_dim // 2):
        stored = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
        assert (order[pair], order[pair + DIM // 2]) == stored


def test_heads_without_pairs_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="heads of 7 values, 4 of them turned: both must be even"):
        rotary_order(7, 4, False)


def packings() -> dict[str, tuple[Projections, int, tuple[str, ...]]]:
    """Name → (projections, KV heads, tensors)."""
    return {
        "separate": (separate, 2, ("q_proj", "k_proj", "v_proj")),
        "stacked": (stacked("qkv"), 2, ("qkv",)),
        "stacked-one": (stacked("qkv"), 1, ("qkv",)),
        "head-by-head": (head_by_head("qkv"), HEADS, ("qkv",)),
        "grouped": (grouped("qkv", 2), HEADS, ("qkv",)),
    }


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", packings())
def test_ranks_hold_their_heads_of_every_packing(name: str, size: int, tmp_path: Path) -> None:
    projections, num_kv_heads, tensors = packings()[name]
    config = AttentionConfig(
        HIDDEN, HEADS, num_kv_heads, DIM, qkv_bias=True, rotary_dim=4, interleaved=True, projections=projections
    )
    rows = {"q_proj": HEADS * DIM, "k_proj": num_kv_heads * DIM, "v_proj": num_kv_heads * DIM}
    rows["qkv"] = sum(rows.values())
    weights = {f"a.{each}.weight": random(rows[each], HIDDEN) for each in tensors}
    weights |= {f"a.{each}.bias": random(rows[each]) for each in tensors}
    loading = loading_of(tmp_path, weights)

    def project(shard: Shard) -> tuple[torch.Tensor, ...]:
        attention = Attention("a", 0, config, shard)
        attention.qkv.load(loading)
        counts = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
        return attention.qkv(random(3, HIDDEN)).view(3, -1, DIM).split(counts, dim=1)

    q, k, v = project(SINGLE)
    for rank in range(size):
        ours, keys, values = project(Shard(rank, size))
        heads = range(rank * HEADS // size, (rank + 1) * HEADS // size)
        group = HEADS // num_kv_heads
        kv_heads = sorted({head // group for head in heads})
        torch.testing.assert_close(ours, q[:, list(heads)], rtol=0, atol=1e-6)
        torch.testing.assert_close(keys, k[:, kv_heads], rtol=0, atol=1e-6)
        torch.testing.assert_close(values, v[:, kv_heads], rtol=0, atol=1e-6)


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="6 heads; this family packs them in 4 equal groups"):
        Attention("a", 0, AttentionConfig(36, 6, 6, 6, projections=grouped("qkv", 4)))


@pytest.mark.parametrize("size", [2, 4])
def test_split_stacked_mlps_add_up_to_the_whole(size: int, tmp_path: Path) -> None:
    weights = {"m.gate_up_proj.weight": random(24, HIDDEN), "m.down_proj.weight": random(HIDDEN, 12)}
    loading = loading_of(tmp_path, weights)

    def run(shard: Shard) -> torch.Tensor:
        mlp = StackedGatedMLP("m", HIDDEN, 12, shard=shard)
        mlp.gate_up.load(loading)
        mlp.down.load(loading)
        result: torch.Tensor = mlp(random(5, HIDDEN))
        return result

    parts = [run(Shard(rank, size)) for rank in range(size)]
    torch.testing.assert_close(torch.stack(parts).sum(0), run(SINGLE), rtol=1e-5, atol=1e-5)
