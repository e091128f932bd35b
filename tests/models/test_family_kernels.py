"""Families through the GPU's attention kernels, rotation fused with the store: one path for all, interpreted here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tabstop.attention.triton import TritonAttention
from tests.kernels.rows import DEVICE
from tests.models.families import VARIANTS, write_variant
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner

NAMES = ["llama-yarn", "mistral-window", "ministral3", "qwen3", "gpt-bigcode", "gemma", "phi-odd", "codegen", "glm"]
PROMPTS = [[5, 9, 30, 22, 11, 80, 7, 8, 9], [3, 4], [7] * 14]
MORE = {0: [5], 1: [6, 7], 2: [1, 2, 3]}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels are interpreted on the CPU only where there is no card")
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_oracle_s(name: str, tmp_path: Path) -> None:
    folder = write_variant(tmp_path, VARIANTS[name])
    runner = PagedRunner(load(folder), backend=TritonAttention)
    whole = oracle_logits(folder, [prompt + MORE[index] for index, prompt in enumerate(PROMPTS)])
    first, second = runner.step(dict(enumerate(PROMPTS))), runner.step(MORE)
    for index, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat((first[index], second[index])), expected, rtol=0, atol=1e-5)
