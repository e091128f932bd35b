"""Prompt log-probabilities over real (tiny, random) models: transformers' own, whatever shares a step with a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.core import EngineCore
from tabstop.kernels.cpu import library
from tabstop.sampling.steps import ROWS_AT_ONCE
from tabstop.types import Abort, CachePolicy, FinishReason, Limits, Sampling, TokenLogprobs
from tests.engine.driver import Driver
from tests.engine.simulated import expected_output, expected_prompt, make_core
from tests.models.oracle import oracle_logits
from tests.tiny import tiny_llama

PROMPTS = [[(n * 37 + at * at) % 250 for at in range(1 + 17 * n)] for n in range(6)]
NUM_TOP = 3
SAMPLINGS = [
    Sampling(temperature=0, num_prompt_logprobs=NUM_TOP),
    Sampling(temperature=1, seed=4, num_prompt_logprobs=0, num_logprobs=2),
    Sampling(temperature=0, num_prompt_logprobs=NUM_TOP, logit_bias=((11, 50.0),), repetition_penalty=2.0),
    Sampling(temperature=0),
    Sampling(temperature=0.5, seed=6, num_prompt_logprobs=1, banned=((7,),)),
    Sampling(temperature=0, num_prompt_logprobs=NUM_TOP),
]
EXACT = 1e-4
"""Nats, of float32."""

ROUNDED = 0.2
"""Nats on average, of 8-bit inputs and a bfloat16 cache, where another token's log-probability is 1.5 away."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder) -> list[torch.Tensor]:
    """float64 [n, vocab] of each prompt: log-probabilities of what comes after each token."""
    return [logits.double().log_softmax(-1) for logits in oracle_logits(folder, PROMPTS)]


def start(folder: Path, **options) -> EngineCore:
    options = {"max_model_len": 128, "num_kv_blocks": 256, "block_size": 4, "max_num_batched_tokens": 512} | options
    return build_core(EngineConfig(model=str(folder), **{"num_threads": 1, "dtype": "float32"} | options))


def prompts_of(folder: Path, max_tokens: int = 8, **options) -> list[list[TokenLogprobs]]:
    """What is said of PROMPTS, all at once."""
    core = start(folder, **options)
    driver = Driver(core)
    keys = [driver.add(prompt, max_tokens, sampling=SAMPLINGS[n]) for n, prompt in enumerate(PROMPTS)]
    driver.run()
    core.close()
    assert [len(driver.tokens[key, 0]) for key in keys] == [max_tokens] * len(PROMPTS)
    return [driver.prompts[key] for key in keys]


def assert_equal(found: list[list[TokenLogprobs]], reference: list[torch.Tensor]) -> None:
    for prompt, sampling, entries, expected in zip(PROMPTS, SAMPLINGS, found, reference, strict=True):
        num_top = sampling.num_prompt_logprobs
        assert len(entries) == (0 if num_top is None else len(prompt) - 1)
        for entry, token_id, row in zip(entries, prompt[1:], expected, strict=False):
            assert entry.logprob == pytest.approx(float(row[token_id]), abs=EXACT)
            assert entry.top_logprobs == pytest.approx(row.topk(num_top).values.tolist(), abs=EXACT)
            assert entry.top_logprobs == pytest.approx(row[entry.top_ids].tolist(), abs=EXACT)
            assert entry.rank == 1 + int((row > row[token_id]).sum())


PAIRS = [
    pytest.param({}, id="batched"),
    pytest.param({"max_tokens": 0}, id="prompts only"),
    pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 6}, id="chunked"),
    pytest.param({"num_kv_blocks": 47, "block_size": 2, "max_model_len": 94, "prefix_cache": False}, id="preempted"),
    pytest.param({"num_kv_blocks": 47, "block_size": 2, "max_model_len": 94, "overlap": "on"}, id="preempted, overlap"),
    pytest.param({"overlap": "on", "max_num_batched_tokens": 9, "max_num_seqs": 5}, id="overlap and chunks"),
]


@pytest.mark.parametrize("options", PAIRS)
def test_they_are_the_models_own(folder, reference, options):
    assert_equal(prompts_of(folder, **options), reference)


@pytest.fixture(params=["library", "torch"])
def fast_path(request, monkeypatch) -> Iterator[str]:
    """The CPU's own kernels, a step in one call; and PyTorch's packed products, as without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(library._chosen, "library", None)
        monkeypatch.setattr(library._chosen, "reason", "there is no compiler")
    elif reason := library.refuse():
        pytest.skip(reason)
    yield request.param


def mean_error(found: list[list[TokenLogprobs]], reference: list[torch.Tensor], shift: int) -> float:
    """Of all tokens, against the row of the token before (shift 0) or of one beside it."""
    errors = [
        abs(entry.logprob - float(row[token_id]))
        for prompt, entries, expected in zip(PROMPTS, found, reference, strict=True)
        for entry, token_id, row in zip(entries, prompt[1:], expected.roll(shift, 0), strict=False)
    ]
    assert len(errors) > 150
    return sum(errors) / len(errors)


def test_fast_paths_round_and_no_more(folder, reference, fast_path):
    fast = {"dtype": "auto", "block_size": 16, "num_threads": 2}
    core = start(folder, **fast)
    steps = core.info.kernels["steps"]
    core.close()
    assert (steps == "one call") == (fast_path == "library")
    whole = prompts_of(folder, **fast)
    chunked = prompts_of(folder, **fast, max_num_batched_tokens=7, max_num_seqs=6)
    for found in (whole, chunked):
        assert mean_error(found, reference, shift=0) < ROUNDED
        assert mean_error(found, reference, shift=1) > 5 * ROUNDED


def test_logits_of_a_prompt_never_exist_all_at_once(folder):
    core = start(folder, max_model_len=512)
    model, counts = core.workers.worker.model, []
    core.workers.worker.model = Counting(model, counts)
    driver = Driver(core)
    keys = [driver.add([5] * 230, 1, sampling=SAMPLINGS[0]) for _ in range(2)]
    driver.run()
    core.close()
    assert all(len(driver.prompts[key]) == 229 for key in keys)
    assert sum(counts) == 2 * 229 + 2 and max(counts) == ROWS_AT_ONCE


class Counting:
    """A model that notes how many rows of logits it computes at a time."""

    def __init__(self, model, counts: list[int]) -> None:
        self._model, self._counts = model, counts

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden):
            self._counts.append(len(hidden))
        return self._model.logits(hidden)


def test_cached_prompts_are_computed_again_and_serve_others(folder, reference):
    core = start(folder)
    driver, prompt = Driver(core), PROMPTS[5]
    keys = []
    for sampling in (SAMPLINGS[3], SAMPLINGS[5], SAMPLINGS[5], SAMPLINGS[3]):
        keys.append(driver.add(prompt, 2, sampling=sampling))
        driver.run()
    core.close()
    assert [driver.deltas[key, 0].num_cached_tokens for key in keys] == [0, 0, 0, len(prompt) - 1]
    for key in keys[1:3]:
        found = [entry.logprob for entry in driver.prompts[key]]
        expected = [float(row[token]) for row, token in zip(reference[5], prompt[1:], strict=False)]
        assert found == pytest.approx(expected, abs=EXACT)


def test_what_such_a_request_writes_is_found(folder):
    core = start(folder)
    driver = Driver(core)
    first = driver.add(PROMPTS[4], 0, sampling=SAMPLINGS[0])
    driver.run()
    second = driver.add(PROMPTS[4], 2)
    driver.run()
    core.close()
    assert driver.deltas[first, 0].finish is FinishReason.LENGTH and driver.tokens[first, 0] == []
    assert driver.deltas[second, 0].num_cached_tokens == len(PROMPTS[4]) - 1


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_forks_say_it_once(folder, reference, max_tokens):
    core = start(folder, max_num_batched_tokens=16, max_num_seqs=8)
    driver, prompt = Driver(core), PROMPTS[5]
    key = driver.add(prompt, max_tokens, sampling=SAMPLINGS[5], num_samples=5)
    driver.run()
    core.close()
    assert [len(driver.tokens[key, sample]) for sample in range(5)] == [max_tokens] * 5
    expected = [float(row[token]) for row, token in zip(reference[5], prompt[1:], strict=False)]
    assert [entry.logprob for entry in driver.prompts[key]] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("overlap", [False, True])
def test_other_samples_take_over_when_the_first_is_aborted(overlap):
    """They compute the prompt each for itself, since such a request reads no cache; each token is said once."""
    core = make_core(max_num_batched_tokens=12, overlap=overlap)
    driver, prompt = Driver(core), [(n * n + 3) % 97 for n in range(50)]
    sampling = Sampling(temperature=1, seed=3, num_prompt_logprobs=1)
    key = driver.add(prompt, 5, sampling=sampling, num_samples=3, cache=CachePolicy())
    for _ in range(3):
        driver.step()
    assert 0 < len(driver.prompts[key]) < len(prompt) - 1
    core.abort(Abort(key, (0,)))
    driver.run()
    assert driver.finish[key, 0] is FinishReason.ABORT
    assert driver.prompts[key] == expected_prompt(prompt, 1)
    for sample in (1, 2):
        assert driver.tokens[key, sample] == expected_output(prompt, 5, sampling, sample)


def test_samples_that_compute_a_prompt_side_by_side_say_it_once():
    core = make_core(num_blocks=128, max_num_batched_tokens=110)
    driver, prompt = Driver(core), [(n * n + 3) % 97 for n in range(50)]
    driver.add(list(range(90)), 20)
    sampling = Sampling(temperature=1, seed=3, num_prompt_logprobs=1)
    key = driver.add(prompt, 5, sampling=sampling, num_samples=3)
    driver.step()
    core.abort(Abort(key, (0,)))
    driver.run()
    reports = [row.report for plan in core.workers.plans for row in plan.rows if row.report]
    assert sum(len(report.next_ids) for report in reports) > len(prompt), "both computed what neither had reported"
    assert driver.prompts[key] == expected_prompt(prompt, 1)


def test_a_preempted_prompt_says_nothing_twice():
    core = make_core(num_blocks=16, block_size=4, max_num_batched_tokens=8, max_num_seqs=4, max_model_len=64)
    driver = Driver(core)
    sampling = Sampling(temperature=0, num_prompt_logprobs=0)
    prompts = [[(n * 31 + at * at) % 97 for at in range(24)] for n in range(4)]
    keys = [driver.add(prompt, 16, sampling=sampling) for prompt in prompts]
    driver.run()
    assert core.scheduler.counters.num_preemptions > 0
    assert [driver.prompts[key] for key in keys] == [expected_prompt(prompt, 0) for prompt in prompts]


@pytest.mark.parametrize("count", [-1, 21])
def test_more_than_twenty_are_refused(count):
    driver = Driver(make_core())
    key = driver.add([1, 2], sampling=Sampling(num_prompt_logprobs=count), limits=Limits(2))
    driver.run()
    failure = driver.deltas[key, 0].failure
    assert failure is not None and failure.message == f"prompt_logprobs is {count}; it must be 0 to 20"
