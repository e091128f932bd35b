"""Puts an engine core together from its options: checkpoint, model, KV memory, workers, stop sets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from tabstop.attention import AttentionBackend, Need, make_backend
from tabstop.cache.blocks import BlockPool
from tabstop.cache.sizing import Demand, size_pool
from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.config import EngineConfig
from tabstop.device import free_bytes, num_cores, resolve_device
from tabstop.engine.core import EngineCore
from tabstop.engine.scheduler import Scheduler
from tabstop.errors import MemoryShortageError
from tabstop.fit import FitReport, fit
from tabstop.grammar import GrammarLimits, Vocabulary
from tabstop.kernels.cpu.library import Threads, library
from tabstop.models import Model, ProgressCallback
from tabstop.models.compiled import CompiledDecoder, compile_steps
from tabstop.models.loader import load_model
from tabstop.text.defaults import stop_sets
from tabstop.text.tokenizer import Tokenizer, load_tokenizer
from tabstop.types import EngineInfo
from tabstop.worker.batch import SlotState
from tabstop.worker.group import LocalGroup
from tabstop.worker.memory import StartAccount
from tabstop.worker.worker import Worker

NUM_COMPILERS = 2
"""Threads that compile constraints beside the engine's loop."""


def build_core(config: EngineConfig, progress: ProgressCallback | None = None) -> EngineCore:
    """Loads the model and returns a core that is ready to step. Raises StartupError subclasses."""
    account = StartAccount(device := resolve_device(config.device))
    with account.time("checkpoint"):
        checkpoint = open_checkpoint(config.model, revision=config.revision, offline=config.offline)
    if device == "cpu":
        with account.time("kernels"):
            prepare_cpu(config, progress)
    sizes = fit(checkpoint, config)
    if sizes.problem is not None:
        raise MemoryShortageError(sizes.problem)
    with account.book("weights"):
        decoder = load_model(checkpoint, config, torch.device(sizes.device), getattr(torch, sizes.dtype), progress)
    attention = make_attention(decoder, config, sizes)
    model, steps = compile_steps(decoder, attention)
    if isinstance(model, CompiledDecoder):
        torch.set_num_threads(1)  # what is left for torch is small, and its waiting threads would take ours' cores
    if sizes.device == "cuda":
        if config.cuda_graphs:
            with account.time("kernels"):
                compile_kernels(model, attention, sizes)
        with account.time("measuring"):
            sizes = replace(sizes, num_blocks=measure_num_blocks(model, attention, config, sizes))
    with account.book("KV cache"):
        worker = make_worker(model, attention, sizes, sizes.num_blocks)
    if sizes.device == "cuda":
        num_tokens = min(sizes.max_num_batched_tokens, sizes.num_blocks * config.block_size)
        with account.book("graphs"):
            (worker.capture_graphs if config.cuda_graphs else worker.warm_up)(num_tokens)
    pool, tokenizer = BlockPool(sizes.num_blocks, config.block_size), load_own_tokenizer(checkpoint, config)
    return EngineCore(
        engine_info(sizes, model, {"attention": attention.name, "steps": steps}, account),
        Scheduler(pool, sizes.max_num_seqs, sizes.max_num_batched_tokens, config.prefix_cache),
        LocalGroup(worker),
        ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="compile"),
        stop_sets=stop_sets(checkpoint, tokenizer),
        vocabulary=make_vocabulary(model.vocab_size, tokenizer, config),
        max_num_waiting=config.max_num_waiting,
        overlap=config.overlap == "on" or (config.overlap == "auto" and sizes.device == "cuda"),
    )


def make_vocabulary(vocab_size: int, tokenizer: Tokenizer, config: EngineConfig) -> Vocabulary:
    return Vocabulary(
        vocab_size,
        lambda: tokenizer.token_bytes,
        control=lambda: tokenizer.control_bytes,
        encode=partial(tokenizer.encode, control=False),
        limits=GrammarLimits(
            max_bytes=config.max_grammar_bytes,
            max_depth=config.max_grammar_depth,
            compile_seconds=config.grammar_timeout,
            mask_seconds=config.grammar_step_timeout,
            num_cached=config.num_cached_grammars,
        ),
    )


def prepare_cpu(config: EngineConfig, progress: ProgressCallback | None) -> None:
    """Sets the number of threads, and makes the kernels ready; the first time on a machine they are compiled."""
    Threads.count = config.num_threads or num_cores()
    torch.set_num_threads(Threads.count)
    if config.dtype == "auto" or (config.dtype, config.kv_dtype) == ("float32", "bfloat16"):  # what takes them
        library(progress)


def engine_info(sizes: FitReport, model: Model, kernels: dict[str, str], account: StartAccount) -> EngineInfo:
    return EngineInfo(
        model=sizes.model,
        architecture=sizes.architecture,
        max_model_len=sizes.max_model_len,
        vocab_size=model.vocab_size,
        block_size=sizes.block_size,
        num_blocks=sizes.num_blocks,
        max_num_seqs=sizes.max_num_seqs,
        device=sizes.device,
        dtype=sizes.dtype,
        weight_bytes=model.weight_bytes,
        kv_bytes_per_token=sizes.kv_bytes_per_token,
        kernels={**kernels, "weights": model.weights},
        load_seconds=account.seconds,
        load_stages=account.stages,
        memory=account.close(),
    )


def make_attention(model: Model, config: EngineConfig, sizes: FitReport) -> AttentionBackend:
    """One backend for all layers. Raises ConfigError when all decline."""
    spec = model.cache_specs[0]
    need = Need(
        num_heads=model.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=getattr(torch, sizes.dtype),
        kv_dtype=getattr(torch, sizes.kv_dtype),
        device=torch.device(sizes.device),
        block_size=sizes.block_size,
        window=spec.window,
    )
    return make_backend(need, config.attention)


def make_worker(model: Model, attention: AttentionBackend, sizes: FitReport, num_blocks: int) -> Worker:
    kv = [attention.allocate(spec, num_blocks + 1) for spec in model.cache_specs]  # the last block is scratch
    tables = np.zeros((sizes.max_num_seqs, -(-sizes.max_model_len // sizes.block_size)), np.int32)
    device = torch.device(sizes.device)
    state = SlotState(tables, sizes.block_size, num_blocks, device, attention.sharing_width)
    return Worker(model, attention, kv, state)


def compile_kernels(model: Model, attention: AttentionBackend, sizes: FitReport) -> None:
    """Those of a GPU's graphs, by all cores."""
    worker = make_worker(model, attention, sizes, -(-sizes.max_num_batched_tokens // sizes.block_size))
    worker.compile_kernels(sizes.max_num_batched_tokens, num_cores())
    del worker
    torch.cuda.empty_cache()


def measure_num_blocks(model: Model, attention: AttentionBackend, config: EngineConfig, sizes: FitReport) -> int:
    """Blocks that a GPU's memory holds beside the weights and the largest step, which runs once to be measured."""
    if config.num_kv_blocks is not None or config.kv_memory is not None:
        return sizes.num_blocks
    needed = -(-sizes.max_num_batched_tokens // config.block_size)
    worker = make_worker(model, attention, sizes, needed)
    step_bytes = worker.measure_peak(sizes.max_num_batched_tokens)
    if config.cuda_graphs:
        step_bytes += worker.measure_graphs(sizes.max_num_batched_tokens)
    del worker
    torch.cuda.empty_cache()
    free = free_bytes(sizes.device, config.gpu_memory_utilization) - step_bytes
    demand = Demand(sizes.kv_bytes_per_token, sizes.max_model_len, sizes.max_num_seqs)
    return size_pool(config, demand, free, sizes.device) - 1


def load_own_tokenizer(checkpoint: Checkpoint, config: EngineConfig) -> Tokenizer:
    """The engine's copy: stop sets and constraints ask it, requests come as ids."""
    source = checkpoint
    if config.tokenizer:
        source = open_checkpoint(config.tokenizer, offline=config.offline)
    return load_tokenizer(source)
