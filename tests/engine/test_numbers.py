"""A model that computes no numbers: the request ends with an error, who shares its steps goes on as if alone, and
nobody finds what it computed.

One row of a real checkpoint's embeddings is NaN or infinite, so that whoever meets that token has no logits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.kernels.cpu.library import refuse
from tabstop.types import FinishReason, Sampling
from tests.engine.driver import GREEDY, Driver
from tests.tiny import VOCAB_SIZE, tiny_llama

PROMPTS = [[(n * 37 + at * at) % 250 for at in range(5 + 9 * n)] for n in range(6)]
SAMPLINGS = [GREEDY, Sampling(temperature=1, seed=4), Sampling(temperature=0.8, seed=5, top_k=20), GREEDY]
OPTIONS = {"max_model_len": 128, "num_kv_blocks": 256, "block_size": 4, "num_threads": 1, "dtype": "float32"}


def make_driver(folder: Path, **options: object) -> Driver:
    return Driver(build_core(EngineConfig(model=str(folder), **(OPTIONS | options))))


def ask_all(driver: Driver) -> list[tuple[tuple[int, int], int]]:
    keys = [driver.add(prompt, 16, sampling=SAMPLINGS[n % 4]) for n, prompt in enumerate(PROMPTS)]
    return [(key, 0) for key in keys]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="module")
def expected(healthy: Path) -> list[list[int]]:
    driver = make_driver(healthy)
    keys = ask_all(driver)
    driver.run()
    return [driver.tokens[key] for key in keys]


@pytest.fixture(scope="module")
def poison(expected: list[list[int]]) -> int:
    """A token that nobody else meets."""
    return min(set(range(VOCAB_SIZE)) - {token for tokens in PROMPTS + expected for token in tokens})


@pytest.fixture(scope="module", params=["nan", "inf"])
def sick(request: pytest.FixtureRequest, poison: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("sick"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float(request.param)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_failed(driver: Driver, key: tuple[tuple[int, int], int], tokens: list[int]) -> None:
    assert driver.finish[key] is FinishReason.ERROR and driver.tokens[key] == tokens
    assert driver.deltas[key].failure.code == "internal_error" and "NaN" in driver.deltas[key].failure.message


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_it_ends_alone(sick: Path, expected: list[list[int]], poison: int, overlap: str, sampling: Sampling) -> None:
    """In a pool so small that the others get its blocks, with what it left in them."""
    driver = make_driver(sick, overlap=overlap, max_num_batched_tokens=64, num_kv_blocks=36, max_model_len=80)
    bad = driver.add([1, *PROMPTS[5], poison, 1, 2, 3, 4, 5], 16, sampling=sampling, num_samples=2)
    late = driver.add([1, 2], 16, sampling=Sampling(temperature=0, logit_bias=((poison, 100.0),)))
    others = ask_all(driver)
    driver.run()
    for key, tokens in (((bad, 0), []), ((bad, 1), []), ((late, 0), [poison])):
        assert_failed(driver, key, tokens)
    assert [driver.tokens[key] for key in others] == expected


@pytest.mark.parametrize("memory", ["sdpa", "cpu"])
def test_others_go_on_over_other_memory(sick: Path, poison: int, memory: str) -> None:
    """Where what else a step holds changes the last bits, so that only the ends can be compared."""
    options: dict[str, object] = {"dtype": "bfloat16", "attention": "sdpa", "num_kv_blocks": 36, "max_model_len": 80}
    if memory == "cpu":  # inputs of 8 bits, too, in which a NaN could be lost
        if reason := refuse():
            pytest.skip(reason)
        options = {"dtype": "auto", "block_size": 16, "num_kv_blocks": 12, "max_model_len": 96}
    driver = make_driver(sick, max_num_batched_tokens=64, **options)
    assert driver.core.info.kernels["attention"] == memory
    banned = Sampling(temperature=1, seed=3, banned=((poison,),))
    bad, others = [], []
    for prompt in PROMPTS:
        bad.append((driver.add([1, *prompt, poison, 1, 2, 3, 4, 5], 16), 0))
        others.append((driver.add(prompt, 16, sampling=banned), 0))
    driver.run()
    for key in bad:
        assert_failed(driver, key, [])
    assert {driver.finish[key] for key in others} == {FinishReason.LENGTH}


def test_a_prompt_that_only_is_looked_at_ends_so_too(sick: Path, poison: int) -> None:
    driver = make_driver(sick)
    key = driver.add([1, 2, poison, 3, 4], 0, sampling=Sampling(temperature=0, num_prompt_logprobs=1)), 0
    driver.run()
    assert_failed(driver, key, [])


def test_what_it_computed_is_found_by_nobody(sick: Path, expected: list[list[int]], poison: int) -> None:
    driver = make_driver(sick)
    for _ in range(2):
        key = driver.add([*PROMPTS[5], poison, *PROMPTS[5]], 16), 0
        driver.run()
        assert_failed(driver, key, [])
        assert driver.deltas[key].num_cached_tokens == 0
    again = driver.add(PROMPTS[5], 16, sampling=SAMPLINGS[1]), 0
    driver.run()
    assert driver.tokens[again] == expected[5]
    assert driver.core.stats().ledger.used == 0
