"""The engine on a real GPU: its pairs, in float32 so that equal means equal."""

from __future__ import annotations

import warnings
from array import array
from functools import partial

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.plan import Admission
from tabstop.sampling.sampler import Sampler
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


COMMON = [(at * at + 3 * at) % 250 for at in range(200)]
SHARING = [COMMON[: 200 - 70 * (n % 2)] + [(n * 31 + at) % 250 for at in range(3 + n)] for n in range(24)]
"""Two groups, of which one shares a part of what the other does."""


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"num_kv_blocks": 100}])
def test_prefixes_that_are_read_once_change_no_token(folder, options):
    options = {"max_model_len": 256, "num_kv_blocks": 1024, "dtype": "float32", "max_num_seqs": 24} | options
    drawn = {}
    for device in ("cpu", "cuda"):
        core = build_core(EngineConfig(model=str(folder), device=device, **options))
        driver = Driver(core)
        driver.add(COMMON, 1)  # so that the others find it
        driver.run()
        keys = [driver.add(prompt, 24) for prompt in SHARING]
        driver.run()
        drawn[device] = [driver.tokens[key, 0] for key in keys]
        core.close()
    assert drawn["cuda"] == drawn["cpu"]


LOOKING_BACK = [
    Sampling(temperature=0, repetition_penalty=2, num_logprobs=3),
    Sampling(temperature=0, frequency_penalty=2, presence_penalty=1, penalty_window=9),
    Sampling(temperature=0, banned=((7,), (9, 3)), logit_bias=((11, 4.0), (9, 5.0), (3, 5.0))),
    Sampling(temperature=0, allowed_token_ids=tuple(range(0, 250, 3))),
    Sampling(temperature=0),
]
"""What the host knows a step late must be known on the device."""


@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"overlap": "off"}, {"num_kv_blocks": 40}])
def test_draws_that_look_back_are_the_cpus(folder, options):
    assert outputs(folder, samplings=LOOKING_BACK, **options) == outputs(folder, samplings=LOOKING_BACK, device="cpu")


def reported_prompts(folder, **options) -> list[tuple[list[int], list[float], list[int]]]:
    """Of PROMPTS, of which every second one is reported: (drawn tokens, log-probabilities, ranks and likeliest ids)."""
    options = {"max_model_len": 256, "num_kv_blocks": 512, "dtype": "float32", "device": "cuda"} | options
    core = build_core(EngineConfig(model=str(folder), max_num_seqs=16, **options))
    driver = Driver(core)
    wanted = [Sampling(temperature=0, num_prompt_logprobs=2), Sampling(temperature=0)]
    keys = [driver.add(prompt, 24, sampling=wanted[n % 2], num_samples=2) for n, prompt in enumerate(PROMPTS)]
    driver.run()
    core.close()
    return [
        (
            driver.tokens[key, 0] + driver.tokens[key, 1],
            [value for entry in driver.prompts[key] for value in (entry.logprob, *entry.top_logprobs)],
            [value for entry in driver.prompts[key] for value in (entry.rank, *entry.top_ids)],
        )
        for key in keys
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"cuda_graphs": False}, {"overlap": "off"}, {"max_num_batched_tokens": 32}, {"num_kv_blocks": 40}],
)
def test_prompts_log_probabilities_are_the_cpus(folder, options):
    """Steps with them take the eager path between graphs; the tokens of all rows stay."""
    found, expected = reported_prompts(folder, **options), reported_prompts(folder, device="cpu")
    for one, other in zip(found, expected, strict=True):
        assert (one[0], one[2]) == (other[0], other[2])
        assert one[1] == pytest.approx(other[1], abs=1e-3)
    assert [len(each[1]) for each in found] == [3 * (len(p) - 1) * (n % 2 == 0) for n, p in enumerate(PROMPTS)]


def test_no_step_waits_for_the_device():
    device, vocab = torch.device("cuda"), 5000
    history = array("I", range(10))
    drawn = [
        *(replace(sampling, temperature=1.0, seed=n) for n, sampling in enumerate(LOOKING_BACK)),
        Sampling(seed=7, min_p=0.01, top_k=900, top_p=0.99, typical_p=0.95, num_logprobs=20),
    ]
    samplers = []
    for where in (device, torch.device("cpu")):
        samplers.append(Sampler(len(drawn), where))
        samplers[-1].admit(
            Admission(slot, sampling, 0, 4, history if sampling.looks_back else None, 20, frozenset({1}))
            for slot, sampling in enumerate(drawn)
        )
    logits = torch.randn(len(drawn), vocab, device=device)
    slots, masks = np.arange(len(drawn)), np.full((len(drawn), -(-vocab // 32)), -1, np.int32)
    masks[-1, :7] = 0x0F0F0F0F
    sample = partial(samplers[0].sample, logits, slots, np.full(len(drawn), 10), masks)
    sample()  # kernels are compiled and memory is taken
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        tokens = sample()
        reported = samplers[0].report(logits, tokens, slots, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reported is not None and reported.ids.shape == (2, 21)
    expected = samplers[1].sample(logits.cpu(), slots, np.full(len(drawn), 10), masks)
    assert (tokens.cpu() == expected).sum() >= len(drawn) - 1, "but for rounding at a border between two tokens"
