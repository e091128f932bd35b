"""Families behind the whole engine: chunked prompts, batches and shared prefixes give the oracle's greedy tokens."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from tabstop import LLM, SamplingParams
from tests import tiny
from tests.models.families import VARIANTS, write_variant
from tests.models.oracle import oracle_logits

NAMES = ["mistral-window", "ministral3", "starcoder2", "gpt-bigcode", "gemma", "phi-odd", "codegen", "granite", "glm4"]
CLOSE = 1e-4
"""Two best logits nearer than that may change places."""


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_oracle_s(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    config = variant.config | {"vocab_size": tiny.VOCAB_SIZE}
    folder = write_variant(tmp_path, dataclasses.replace(variant, config=config))
    (folder / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    rng = random.Random(name)
    start = [rng.randrange(256) for _ in range(20)]
    prompts = [start[: rng.randrange(1, 20)] + [rng.randrange(256) for _ in range(n)] for n in (1, 3, 17, 33, 50)]
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "block_size": 8, "num_kv_blocks": 200}
    llm = LLM(model=str(folder), max_model_len=128, dtype="float32", device="cpu", num_threads=1, **options)
    try:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    finally:
        llm.close()
    for prompt, answer in zip(prompts, answers, strict=True):
        drawn = list(answer.outputs[0].token_ids)
        assert len(drawn) == 20
        (logits,) = oracle_logits(folder, [prompt + drawn])
        for token_id, row in zip(drawn, logits[len(prompt) - 1 : -1], strict=True):
            assert row.max() - row[token_id] < CLOSE
