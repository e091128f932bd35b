"""The engine on a real GPU: its pairs, in float32 so that equal means equal."""

from __future__ import annotations

import pytest
import torch

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.types import Sampling
from tests.engine.driver import Driver
from tests.tiny import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

PROMPTS = [[(n * 37 + at * at) % 250 for at in range(5 + 23 * n)] for n in range(9)]
SAMPLINGS = [Sampling(temperature=0), Sampling(temperature=1, seed=4), Sampling(temperature=0.7, seed=5, top_k=20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_llama(tmp_path_factory.mktemp("tiny"), intermediate_size=256, **sizes)


def outputs(folder, *, samplings=SAMPLINGS[:1], num_samples: int = 1, **options) -> list[list[int]]:
    options = {"max_model_len": 256, "num_kv_blocks": 512, "dtype": "float32", "device": "cuda"} | options
    core = build_core(EngineConfig(model=str(folder), max_num_seqs=16, **options))
    driver = Driver(core)
    keys = []
    for n, prompt in enumerate(PROMPTS):
        key = driver.add(prompt, 24, sampling=samplings[n % len(samplings)], num_samples=num_samples)
        keys += [(key, sample) for sample in range(num_samples)]
    driver.run()
    core.close()
    return [driver.tokens[key] for key in keys]


@pytest.fixture(scope="module")
def on_cpu(folder) -> list[list[int]]:
    return outputs(folder, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="graphs and overlap"),
        pytest.param({"cuda_graphs": False}, id="graphs off"),
        pytest.param({"overlap": "off"}, id="overlap off"),
        pytest.param({"max_num_batched_tokens": 32}, id="chunked"),
        pytest.param({"num_kv_blocks": 40}, id="preempted"),
        pytest.param({"attention": "reference", "cuda_graphs": False}, id="reference attention"),
    ],
)
def test_a_gpu_draws_the_cpus_tokens(folder, on_cpu, options):
    assert outputs(folder, **options) == on_cpu


def test_random_draws_do_not_depend_on_graphs_or_overlap(folder):
    plain = outputs(folder, samplings=SAMPLINGS, num_samples=3, cuda_graphs=False, overlap="off")
    assert outputs(folder, samplings=SAMPLINGS, num_samples=3) == plain
