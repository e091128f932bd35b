"""How steps are mixed: the rule itself, and what it does to a schedule."""

from __future__ import annotations

import numpy as np

from tabstop.engine.mix import MIN_CHUNK, RIDGE, TILE, Load, Mix
from tabstop.types import Limits
from tests.engine.driver import Driver
from tests.engine.simulated import VOCAB, make_core


def mix_of(num_pool_tokens: int, prompt: int = 320, max_tokens: int = 256) -> Mix:
    mix = Mix(1024, 2048, num_pool_tokens)
    for _ in range(10):
        mix.see_request(prompt, max_tokens)
    return mix


def test_prompts_alone_fill_the_step():
    assert mix_of(60_000).prompt_budget(Load(0, 1000, 0, 1000)) == 2048


def test_a_full_pool_takes_prompts_as_fast_as_rows_end():
    mix = mix_of(60_960)
    assert mix.num_resident == 136
    chunk = mix.prompt_budget(Load(130, 1000, 0, 870))
    assert abs(chunk - 170) <= TILE // 2 and (130 + chunk) % TILE == 0
    assert mix_of(60_960, prompt=16).prompt_budget(Load(64, 9000, 0, 8000)) == MIN_CHUNK


def test_answers_that_were_seen_replace_the_guess():
    mix = mix_of(60_960)
    for _ in range(20):
        mix.see_answer(32)
    assert mix.mean_answer == 32
    assert mix.prompt_budget(Load(130, 1000, 0, 870)) > 1000


def test_a_long_prompt_beside_streams_comes_in_chunks_and_a_burst_does_not():
    mix = mix_of(1_000_000, prompt=128)
    assert mix.prompt_budget(Load(64, 65, 8192, 0)) == 2 * RIDGE - 64
    assert mix.prompt_budget(Load(500, 501, 8192, 0)) == 500
    assert mix.prompt_budget(Load(64, 1024, 8192, 900)) == 2048


def saturate(*, equal_steps: bool) -> tuple[list[int], int]:
    """100 requests want four times the pool: (tokens of the steps while it is full, preemptions)."""
    core = make_core(num_blocks=400, block_size=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=600)
    if not equal_steps:
        core.scheduler.mix.prompt_budget = lambda load: 2048
    driver, random = Driver(core), np.random.default_rng(0)
    for n in range(100):
        prompt = random.integers(0, VOCAB, 320 if n % 2 else 80).tolist()
        driver.add(prompt, limits=Limits(64, stop_sets=()))
    driver.run()
    sizes = [plan.num_tokens for plan in core.workers.plans]
    return sizes[60 : len(sizes) // 2], core.stats().num_preemptions


def test_a_saturated_engine_takes_equal_steps_and_preempts_few():
    sizes, num_preemptions = saturate(equal_steps=True)
    greedy_sizes, num_greedy_preemptions = saturate(equal_steps=False)
    assert np.quantile(sizes, 0.9) < 1.5 * np.quantile(sizes, 0.1) and max(greedy_sizes) > 4 * np.median(greedy_sizes)
    assert 2 * num_preemptions < num_greedy_preemptions
