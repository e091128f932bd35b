"""How many blocks: the rules of cache/sizing.py on numbers that a person can check."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tabstop.cache import CacheKind, CacheSpec
from tabstop.cache.sizing import (
    GIB,
    Demand,
    check_pool,
    check_weights,
    choose_max_model_len,
    kv_bytes_per_token,
    pool_blocks,
    size_pool,
)
from tabstop.config import EngineConfig
from tabstop.errors import ConfigError, MemoryShortageError

SMOLLM2 = Demand(bytes_per_token=30 * 2 * 3 * 64 * 4, max_model_len=8192, max_num_seqs=64)  # 46,080 bytes in float32


def test_bytes_of_a_token_are_keys_and_values_of_all_layers() -> None:
    specs = [CacheSpec(CacheKind.PAGED, num_kv_heads=3, head_dim=64)] * 30
    assert kv_bytes_per_token(specs, "float32") == SMOLLM2.bytes_per_token
    assert kv_bytes_per_token(specs, "bfloat16") == SMOLLM2.bytes_per_token // 2


def test_the_user_s_numbers_decide() -> None:
    assert pool_blocks(EngineConfig(num_kv_blocks=77), SMOLLM2, 0, "cpu") == 77
    assert pool_blocks(EngineConfig(kv_memory=1.0), SMOLLM2, 0, "cpu") == GIB // (16 * 46_080)


@pytest.mark.parametrize(
    ("free", "max_num_seqs", "expected"),
    [
        (100 * GIB, 64, 4 * GIB // (16 * 46_080)),  # the cap of 4 GiB
        (5 * GIB, 64, 2 * GIB // (16 * 46_080)),  # 40 % of what is free
        (100 * GIB, 2, 2 * 512),  # no more than could ever be used
        (-GIB, 64, 0),
    ],
)
def test_a_cpu_leaves_memory_to_others(free: int, max_num_seqs: int, expected: int) -> None:
    demand = replace(SMOLLM2, max_num_seqs=max_num_seqs)
    assert pool_blocks(EngineConfig(), demand, free, "cpu") == expected


def test_a_longest_request_above_the_cap_is_still_served_when_memory_allows() -> None:
    large = Demand(bytes_per_token=1 << 20, max_model_len=16_384, max_num_seqs=64)  # 16 GiB for one request
    assert size_pool(EngineConfig(), large, 100 * GIB, "cpu") == 1024
    with pytest.raises(MemoryShortageError, match=r"one request of 16384 tokens needs 16\.00 GiB"):
        size_pool(EngineConfig(), large, 30 * GIB, "cpu")


def test_a_gpu_is_used_whole() -> None:
    assert pool_blocks(EngineConfig(), SMOLLM2, 70 * GIB, "cuda") == 70 * GIB // (16 * 46_080)


def test_a_pool_too_small_for_one_request_says_what_to_change() -> None:
    with pytest.raises(MemoryShortageError) as caught:
        size_pool(EngineConfig(num_kv_blocks=511), SMOLLM2, 100 * GIB, "cpu")
    message = caught.value.message
    assert "one request of 8192 tokens needs 0.35 GiB of KV memory, but the pool holds 8176 tokens" in message
    assert all(option in message for option in ("--max-model-len", "--kv-memory", "--kv-dtype"))
    assert size_pool(EngineConfig(num_kv_blocks=512), SMOLLM2, 100 * GIB, "cpu") == 512


@pytest.mark.parametrize(
    ("config", "option"),
    [(EngineConfig(num_kv_blocks=100_000), "--num-kv-blocks"), (EngineConfig(kv_memory=64.0), "--kv-memory")],
)
def test_a_pool_that_exceeds_the_memory_says_which_option(config: EngineConfig, option: str) -> None:
    num_blocks = pool_blocks(config, SMOLLM2, 8 * GIB, "cpu")
    with pytest.raises(MemoryShortageError, match=rf"takes [\d.]+ GiB but 8\.00 GiB are free; lower {option}$"):
        check_pool(config, SMOLLM2, num_blocks, 8 * GIB)


def test_weights_that_do_not_fit() -> None:
    check_weights(GIB, GIB)
    with pytest.raises(MemoryShortageError, match=r"the weights need 2\.00 GiB but 1\.00 GiB are free; use a smaller"):
        check_weights(2 * GIB, GIB)


def test_the_context_is_the_checkpoint_s_or_shorter() -> None:
    assert choose_max_model_len(EngineConfig(), 8192) == 8192
    assert choose_max_model_len(EngineConfig(max_model_len=100), 8192) == 100
    for length, allowed in ((0, "at least 1"), (8193, "allows 1 to 8192 tokens")):
        with pytest.raises(ConfigError, match=rf"--max-model-len is {length}; .*{allowed}"):
            choose_max_model_len(EngineConfig(max_model_len=length), 8192)
