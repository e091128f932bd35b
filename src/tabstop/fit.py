"""Answers what would fit on this machine without loading weights: the same sizes that a start would choose.

Reads file headers only, and compares their tensors with what the model's layers ask for, so a checkpoint that could not
be loaded fails here with the same message.
"""

from __future__ import annotations

from dataclasses import dataclass

from tabstop.cache.sizing import (
    DTYPE_BYTES,
    Demand,
    check_pool,
    check_weights,
    choose_max_model_len,
    kv_bytes_per_token,
    pool_blocks,
)
from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.config import EngineConfig
from tabstop.device import free_bytes, resolve_batch_size, resolve_device, resolve_dtype, total_bytes
from tabstop.errors import MemoryShortageError
from tabstop.quant import CPU_SCHEMES
from tabstop.text.fim_detection import choose
from tabstop.text.tokenizer import load_tokenizer

COMMON_LENGTH = 2048
"""Tokens of a request as editors send them, for the second 'how many fit'."""


@dataclass(frozen=True, slots=True)
class FitReport:
    """Bytes, tokens and requests; `problem` says why a start would fail, None when it would not."""

    model: str
    architecture: str
    form: str  # safetensors, gguf or dummy
    device: str
    dtype: str
    kv_dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    free_bytes: int  # now, before the weights
    num_blocks: int
    block_size: int
    max_model_len: int
    longest_context: int  # the part of max_model_len that the pool can hold
    num_longest: int  # requests of longest_context at once
    num_common: int  # requests of COMMON_LENGTH at once
    max_num_seqs: int
    max_num_batched_tokens: int
    problem: str | None
    fim: str | None = None  # the family in whose layout holes are filled

    def rows(self) -> dict[str, str]:
        """The same for people."""
        num_tokens = self.num_blocks * self.block_size
        rows = {
            "model": f"{self.model} ({self.architecture}, {self.form})",
            "device": f"{self.device}, computes in {self.dtype}, KV cache in {self.kv_dtype}",
            "weights": f"{_size(self.weight_bytes)} of {_size(self.free_bytes)} free",
            "KV cache": f"{self.num_blocks:,} blocks of {self.block_size} = {num_tokens:,} tokens, "
            f"{_size(num_tokens * self.kv_bytes_per_token)} ({self.kv_bytes_per_token:,} bytes a token)",
            "longest context": f"{self.longest_context:,} tokens",
            "requests of that length that fit": f"{self.num_longest:,} (at most {self.max_num_seqs:,} run at once)",
            f"requests of {min(COMMON_LENGTH, self.max_model_len):,} tokens that fit": f"{self.num_common:,}",
            "fill-in-the-middle": self.fim or "none: prefixes are continued",
        }
        return rows if self.problem is None else rows | {"problem": self.problem}


def fit(checkpoint: Checkpoint, config: EngineConfig) -> FitReport:
    """Sizes for this machine as it is now. Raises CheckpointError, UnsupportedModelError or ConfigError."""
    from tabstop.models.loader import plan_loading  # imports torch

    plan = plan_loading(checkpoint, config)
    device = resolve_device(config.device)
    dtype = plan.scheme.compute_dtype or resolve_dtype(config.dtype, plan.config.dtype, device)
    kv_dtype = choose_kv_dtype(config, dtype, plan.scheme.name)
    weight_bytes, free = plan.weight_bytes(DTYPE_BYTES[dtype]), free_bytes(device, config.gpu_memory_utilization)
    max_model_len = choose_max_model_len(config, plan.config.max_position_embeddings)
    batch = resolve_batch_size(config, device, total_bytes(device))
    demand = Demand(kv_bytes_per_token(plan.model.cache_specs, kv_dtype), max_model_len, batch.max_num_seqs)
    num_blocks = max(0, pool_blocks(config, demand, free - weight_bytes, device))
    longest = min(max_model_len, num_blocks * config.block_size)
    return FitReport(
        model=checkpoint.name,
        architecture=plan.config.architecture,
        form=plan.form,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=demand.bytes_per_token,
        free_bytes=free,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        longest_context=longest,
        num_longest=_num_requests(num_blocks, longest, config.block_size),
        num_common=_num_requests(num_blocks, min(COMMON_LENGTH, max_model_len), config.block_size),
        max_num_seqs=batch.max_num_seqs,
        max_num_batched_tokens=batch.max_num_batched_tokens,
        problem=_problem(config, demand, weight_bytes, num_blocks, free),
        fim=_fim(checkpoint, config),
    )


def choose_kv_dtype(config: EngineConfig, dtype: str, scheme: str) -> str:
    """The compute type unless another is asked for; beside a CPU's fast weights bfloat16, which its attention needs."""
    if config.kv_dtype != "auto":
        return config.kv_dtype
    return "bfloat16" if scheme in CPU_SCHEMES and config.attention in ("auto", "cpu", "sdpa") else dtype


def _fim(checkpoint: Checkpoint, config: EngineConfig) -> str | None:
    """The name of the family. Raises ConfigError for one that the vocabulary does not fit, CheckpointError."""
    source = open_checkpoint(config.tokenizer, offline=config.offline) if config.tokenizer else checkpoint
    family = choose(checkpoint, load_tokenizer(source), config.fim)
    return family.name if family else None


def _num_requests(num_blocks: int, num_tokens: int, block_size: int) -> int:
    return num_blocks // -(-num_tokens // block_size) if num_tokens else 0


def _problem(config: EngineConfig, demand: Demand, weight_bytes: int, num_blocks: int, free: int) -> str | None:
    try:
        check_weights(weight_bytes, free)
        check_pool(config, demand, num_blocks, free - weight_bytes)
    except MemoryShortageError as error:
        return error.message
    return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
