"""Every family against transformers: whole, in chunks, batched with others; float32, 1e-5."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tabstop.cache.sizing import choose_max_model_len
from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.errors import ConfigError
from tabstop.models.config import read_model_config
from tests.models.families import LONG_PHI, VARIANTS, VOCAB_SIZE, YARN, Variant, longrope, sizes, write_variant
from tests.models.oracle import load, oracle_logits
from tests.models.paged import PagedRunner

TOLERANCE = 1e-5


def random_prompts(seed: str, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [min(length, longest) for length in (70, 33, 5, 1, 34)]
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_chunked_and_batched_logits_equal_the_oracle_s(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    folder = write_variant(tmp_path, variant)
    prompts = random_prompts(name, variant.options.get("max_model_len", 70))
    expected = oracle_logits(folder, prompts)
    runner = PagedRunner(load(folder, **variant.options))
    assert_same_logits(runner, prompts, expected)


def assert_same_logits(runner: PagedRunner, prompts: list[list[int]], expected: list[torch.Tensor]) -> None:
    """Alone, side by side, and in chunks of random lengths side by side."""
    for prompt, logits in zip(prompts, expected, strict=True):
        torch.testing.assert_close(runner.logits(prompt), logits, rtol=0, atol=TOLERANCE)
    together = runner.step(dict(enumerate(prompts)))
    for index, logits in enumerate(expected):
        torch.testing.assert_close(together[index], logits, rtol=0, atol=TOLERANCE)
    for index, chunked in enumerate(in_chunks(runner, prompts)):
        torch.testing.assert_close(chunked, expected[index], rtol=0, atol=TOLERANCE)


def in_chunks(runner: PagedRunner, prompts: list[list[int]]) -> list[torch.Tensor]:
    """The logits of each prompt, computed in chunks of random lengths and single tokens of all side by side."""
    rng = random.Random(0)
    chunks: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(prompts))}
    rest = {100 + index: list(prompt) for index, prompt in enumerate(prompts)}
    while rest:
        lengths = {sequence: rng.choice((1, 1, 3, 8, 17)) for sequence in rest}
        for sequence, logits in runner.step({key: ids[: lengths[key]] for key, ids in rest.items()}).items():
            chunks[sequence - 100].append(logits)
        rest = {key: ids[lengths[key] :] for key, ids in rest.items() if ids[lengths[key] :]}
    return [torch.cat(parts) for parts in chunks.values()]


def test_dynamic_scaling_is_fixed_for_the_longest_text(tmp_path: Path) -> None:
    """The oracle's base fits the text it sees; ours the longest that will be served, so a full one must agree."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 700.0}
    folder = write_variant(tmp_path, Variant("llama", sizes(rope_parameters=scaling, max_position_embeddings=32)))
    for length in (20, 32, 48, 64):
        (prompt,) = [random_prompts("dynamic", 70)[0][:length]]
        expected = oracle_logits(folder, [prompt])
        assert_same_logits(PagedRunner(load(folder, max_model_len=length)), [prompt], expected)
    assert longest(folder) == 128
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(PagedRunner(load(folder)), [prompt], expected)  # for 128 tokens it is another base


@pytest.mark.parametrize(("num_pairs", "more"), [(4, {}), (3, {"partial_rotary_factor": 0.75})])
def test_longrope_takes_the_divisors_of_the_longest_text(
    num_pairs: int, more: dict[str, float], tmp_path: Path
) -> None:
    scaling = longrope(num_pairs, **more)
    folder = write_variant(tmp_path, Variant("phi3", sizes(rope_parameters=scaling, **LONG_PHI)))
    prompts = [prompt for prompt in random_prompts("longrope", 70) if len(prompt) > 32]
    assert_same_logits(PagedRunner(load(folder)), prompts, oracle_logits(folder, prompts))
    short = [[5, 9, 100, 33, 8]]
    assert_same_logits(PagedRunner(load(folder, max_model_len=32)), short, oracle_logits(folder, short))


def longest(folder: Path, **options: int) -> int:
    return read_model_config(open_checkpoint(str(folder)), **options).max_position_embeddings


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    """Qwen's files name the length before the stretching, Llama's and Mistral's the one behind it."""
    before = write_variant(tmp_path / "b", Variant("qwen2", sizes(rope_parameters=YARN, max_position_embeddings=64)))
    behind = write_variant(tmp_path / "a", Variant("llama", sizes(rope_parameters=YARN, max_position_embeddings=256)))
    assert longest(before) == longest(behind) == 256


def test_a_learned_position_table_is_a_hard_limit(tmp_path: Path) -> None:
    limit = longest(write_variant(tmp_path, VARIANTS["gpt-bigcode"]))
    assert choose_max_model_len(EngineConfig(), limit) == 128
    with pytest.raises(ConfigError, match=r"--max-model-len is 129; this model's context allows 1 to 128 tokens"):
        choose_max_model_len(EngineConfig(max_model_len=129), limit)


def test_surplus_tokens_behind_the_table_do_no_harm(tmp_path: Path) -> None:
    runner = PagedRunner(load(write_variant(tmp_path, VARIANTS["gpt-bigcode"])))
    rows = runner.step({0: [5] * 130, 1: [7, 8]})  # 128 positions exist
    assert torch.isfinite(rows[0]).all()
    torch.testing.assert_close(rows[1], runner.logits([7, 8]), rtol=0, atol=TOLERANCE)
