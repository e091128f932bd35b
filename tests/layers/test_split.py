"""The slicing rule, and that ranks which hold slices compute together what one rank computes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tabstop.checkpoint import open_checkpoint
from tabstop.errors import UnsupportedModelError
from tabstop.layers import SINGLE, Shard, share
from tabstop.layers.attention import Attention, AttentionConfig
from tabstop.layers.linear import Linear, Part
from tabstop.layers.mlp import GatedMLP
from tabstop.models.source import open_source
from tabstop.quant import Loading, make_scheme
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    ("total", "unit", "size", "expected"),
    [
        (12, 1, 1, [(0, 12)]),
        (12, 3, 2, [(0, 6), (6, 12)]),
        (12, 3, 4, [(0, 3), (3, 6), (6, 9), (9, 12)]),
        (6, 3, 4, [(0, 3), (0, 3), (3, 6), (3, 6)]),  # two key heads on four ranks: neighbours hold the same
        (3, 3, 2, [(0, 3), (0, 3)]),
    ],
)
def test_units_are_dealt_out_in_order(total: int, unit: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in (share(total, unit, rank, size) for rank in range(size))] == expected


def test_a_number_of_ranks_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"3 heads .* cannot be divided among 2 ranks"):
        share(9, 3, 0, 2)
    with pytest.raises(UnsupportedModelError, match="4 heads cannot be divided among 8 ranks"):
        Attention("a", 0, AttentionConfig(32, 4, 2, 8), Shard(0, 8))


def loading_of(folder: Path) -> Loading:
    source = open_source(open_checkpoint(str(folder)), "safetensors")
    return Loading(make_scheme("dense"), source.read, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("size", [2, 4])
def test_split_mlps_add_up_to_the_whole(size: int, tmp_path: Path) -> None:
    loading = loading_of(tiny_llama(tmp_path, mlp_bias=True))

    def run(shard: Shard, x: torch.Tensor) -> torch.Tensor:
        mlp = GatedMLP("model.layers.0.mlp", 32, 64, bias=True, shard=shard)
        mlp.gate_up.load(loading)
        mlp.down.load(loading)
        result: torch.Tensor = mlp(x)
        return result

    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    parts = [run(Shard(rank, size), x) for rank in range(size)]
    torch.testing.assert_close(torch.stack(parts).sum(0), run(SINGLE, x), rtol=0, atol=1e-5)


def test_a_rank_holds_its_heads_of_the_fused_projection(tmp_path: Path) -> None:
    loading = loading_of(tiny_llama(tmp_path))
    config = AttentionConfig(32, 4, 2, 8)
    whole = Attention("model.layers.0.self_attn", 0, config)
    whole.qkv.load(loading)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = whole.qkv(x).view(3, 8, 8).split([4, 2, 2], dim=1)
    for rank in range(4):  # more ranks than key heads
        part = Attention("model.layers.0.self_attn", 0, config, Shard(rank, 4))
        part.qkv.load(loading)
        assert (part.num_heads, part.num_kv_heads, part.cache_spec.num_kv_heads) == (1, 1, 1)
        ours = part.qkv(x).view(3, 3, 8)
        expected = torch.stack((q[:, rank], k[:, rank // 2], v[:, rank // 2]), dim=1)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_only_rank_0_adds_the_bias_of_a_matrix_split_by_columns(tmp_path: Path) -> None:
    loading = loading_of(tiny_llama(tmp_path, attention_bias=True))
    for rank in range(2):
        out = Linear("model.layers.0.self_attn", 32, [Part("o_proj", 32)], bias=True, split=Shard(rank, 2).columns)
        out.load(loading)
        assert (out.bias is None) == (rank == 1)
