"""Pairs: ours = transformers', chunked = whole, batched = alone, on tiny random checkpoints in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tabstop.cache import CacheKind, CacheSpec
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_qwen2

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama-theta": (tiny_llama, {"rope_theta": 500.0}),
    "llama-tied": (tiny_llama, {"tie_word_embeddings": True}),
    "llama-mha": (tiny_llama, {"num_key_value_heads": 4}),
    "llama-mqa": (tiny_llama, {"num_key_value_heads": 1}),
    "llama-head-dim": (tiny_llama, {"head_dim": 10, "hidden_size": 36}),
    "llama-no-head-dim": (tiny_llama, {"head_dim": None}),
    "llama-biases": (tiny_llama, {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": (tiny_llama, {"rope_scaling": LLAMA3}),
    "llama-linear": (tiny_llama, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-rope-parameters": (tiny_llama, {"rope_parameters": LLAMA3 | {"rope_theta": 700.0}}),
    "qwen2": (tiny_qwen2, {}),
    "qwen2-untied": (tiny_qwen2, {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}
TOLERANCE = 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_chunked_and_batched_logits_equal_the_oracle(variant: str, tmp_path: Path) -> None:
    make, overrides = VARIANTS[variant]
    folder = make(tmp_path, **overrides)
    rng = random.Random(variant)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (70, 33, 5, 1, 34)]
    expected = oracle_logits(folder, prompts)
    runner = PagedRunner(load(folder))

    for prompt, logits in zip(prompts, expected, strict=True):
        torch.testing.assert_close(runner.logits(prompt), logits, rtol=0, atol=TOLERANCE)

    together = runner.step(dict(enumerate(prompts)))
    for index, logits in enumerate(expected):
        torch.testing.assert_close(together[index], logits, rtol=0, atol=TOLERANCE)

    chunks: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
    rest = {100 + index: list(prompt) for index, prompt in enumerate(prompts)}
    while rest:  # chunks of random lengths and single tokens of all sequences side by side
        lengths = {sequence: rng.choice((1, 1, 3, 8, 17)) for sequence in rest}
        for sequence, logits in runner.step({key: ids[: lengths[key]] for key, ids in rest.items()}).items():
            chunks[sequence - 100].append(logits)
        rest = {key: ids[lengths[key] :] for key, ids in rest.items() if ids[lengths[key] :]}
    for index, logits in enumerate(expected):
        torch.testing.assert_close(torch.cat(chunks[index]), logits, rtol=0, atol=TOLERANCE)


def test_logits_are_float32_whatever_the_compute_type(tmp_path: Path) -> None:
    from tabstop.checkpoint import open_checkpoint
    from tabstop.config import EngineConfig
    from tabstop.models.loader import load_model

    folder = tiny_llama(tmp_path)
    model = load_model(
        open_checkpoint(str(folder)), EngineConfig(dtype="bfloat16"), torch.device("cpu"), torch.bfloat16, None
    )
    runner = PagedRunner(model)
    logits = runner.logits(list(range(20)))
    assert logits.dtype == torch.float32
    (expected,) = oracle_logits(folder, [list(range(20))])
    assert (logits - expected).abs().max() < 0.25  # bfloat16 keeps 8 bits


def test_what_a_model_declares_is_what_it_computes_with(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    model = load(folder)
    assert model.cache_specs == 2 * [CacheSpec(CacheKind.PAGED, num_kv_heads=2, head_dim=8)]
    assert (model.vocab_size, model.num_heads) == (VOCAB_SIZE, 4)
    assert model.weight_bytes == (folder / "model.safetensors").stat().st_size - header_bytes(folder)


def header_bytes(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
