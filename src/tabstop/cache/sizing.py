"""How much KV memory a model needs and how many blocks fit: pure functions of numbers that others measured.

Knows no tensors and reads no clock, file or device; device.py measures what is free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tabstop.cache import CacheSpec
from tabstop.config import EngineConfig
from tabstop.errors import ConfigError, MemoryShortageError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30

CPU_SHARE = 0.4
"""Part of the free memory that the pool takes on a CPU when nothing else is said: the machine has other work."""
CPU_CAP_BYTES = 4 * GIB


@dataclass(frozen=True, slots=True)
class Demand:
    """What a KV pool is for."""

    bytes_per_token: int  # of all layers
    max_model_len: int
    max_num_seqs: int

    def blocks_of(self, num_tokens: int, block_size: int) -> int:
        """Blocks that one sequence of `num_tokens` takes."""
        return -(-num_tokens // block_size)


def kv_bytes_per_token(specs: Iterable[CacheSpec], dtype: str) -> int:
    """Bytes that one position takes in all layers."""
    return sum(spec.bytes_per_token(DTYPE_BYTES[dtype]) for spec in specs)


def choose_max_model_len(config: EngineConfig, checkpoint_len: int) -> int:
    """The longest prompt + completion. Raises ConfigError when the option exceeds what the checkpoint was made for."""
    if config.max_model_len is None:
        return checkpoint_len
    if not 1 <= config.max_model_len <= checkpoint_len:
        raise ConfigError(
            f"--max-model-len is {config.max_model_len}; this model's context allows 1 to {checkpoint_len} tokens"
        )
    return config.max_model_len


def check_weights(weight_bytes: int, free_bytes: int) -> None:
    """Raises MemoryShortageError when the weights alone do not fit."""
    if weight_bytes > free_bytes:
        raise MemoryShortageError(
            f"the weights need {_gib(weight_bytes)} but {_gib(free_bytes)} are free; use a smaller or more strongly "
            "quantized model, a smaller --dtype (bfloat16), or free some memory"
        )


def pool_blocks(config: EngineConfig, demand: Demand, free_bytes: int, device: str) -> int:
    """Blocks of the KV pool; may be too few to be useful, which check_pool says.

    --num-kv-blocks or --kv-memory decide when given. Else on a GPU all free memory (the caller has applied
    --gpu-memory-utilization); on a CPU enough for --max-num-seqs of the longest requests, but at most CPU_SHARE of the
    free memory, and at most 4 GiB unless one longest request needs more than that.
    """
    block_bytes = config.block_size * demand.bytes_per_token
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_memory is not None:
        return int(config.kv_memory * GIB) // block_bytes
    if device != "cpu":
        return max(0, free_bytes) // block_bytes
    longest = demand.blocks_of(demand.max_model_len, config.block_size)
    cap_bytes = max(CPU_CAP_BYTES, longest * block_bytes)
    return min(demand.max_num_seqs * longest, int(min(CPU_SHARE * max(0, free_bytes), cap_bytes)) // block_bytes)


def check_pool(config: EngineConfig, demand: Demand, num_blocks: int, free_bytes: int) -> None:
    """Raises MemoryShortageError when the pool exceeds the free memory or cannot hold one longest request."""
    pool_bytes = num_blocks * config.block_size * demand.bytes_per_token
    if pool_bytes > free_bytes:
        raise MemoryShortageError(
            f"a KV pool of {num_blocks} blocks takes {_gib(pool_bytes)} but {_gib(free_bytes)} are free; lower "
            f"{'--num-kv-blocks' if config.num_kv_blocks is not None else '--kv-memory'}"
        )
    if num_blocks < demand.blocks_of(demand.max_model_len, config.block_size):
        raise MemoryShortageError(
            f"one request of {demand.max_model_len} tokens needs {_gib(demand.max_model_len * demand.bytes_per_token)} "
            f"of KV memory, but the pool holds {num_blocks * config.block_size} tokens ({_gib(pool_bytes)}; "
            f"{_gib(max(0, free_bytes))} are free); lower --max-model-len, raise --kv-memory, or use a smaller "
            "--kv-dtype"
        )


def size_pool(config: EngineConfig, demand: Demand, free_bytes: int, device: str) -> int:
    """pool_blocks, checked. Raises MemoryShortageError."""
    num_blocks = pool_blocks(config, demand, free_bytes, device)
    check_pool(config, demand, num_blocks, free_bytes)
    return num_blocks


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
