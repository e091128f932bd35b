"""What lm-evaluation-harness 0.4.13 sends as `local-completions`, and how it reads the answers.

Form of its requests and how it adds up: lm_eval/models/openai_completions.py. The package is too heavy for CI; it is
run by hand (benchmarks/lm_eval_agreement.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tabstop.checkpoint import open_checkpoint
from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.engine.inproc import InprocClient
from tests.api.serving import serving
from tests.models.oracle import oracle_logits
from tests.tiny import tiny_llama

ITEMS = [
    ([(7 * n + at * at) % 250 for at in range(3 + n)], [(n + 31 * at) % 250 for at in range(1 + n % 5)])
    for n in range(12)
]
"""(context, continuation), token ids each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_model_len": 128}
    client = InprocClient(build_core(EngineConfig(model=str(folder), **options)))
    with serving(open_checkpoint(str(folder)), client) as running:  # type: ignore[arg-type]
        yield running.url
    client.close()


def asked(prompts: list[list[int]]) -> dict[str, Any]:
    settings = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    return {"model": "default", "prompt": prompts, **settings}


def read(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy decoding would have said it) of each choice."""
    found = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), context_lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(own), all(one == max(top.values()) for one, top in zip(own, tops, strict=True))))
    return found


def expected(folder: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    (logits,) = oracle_logits(folder, [context + continuation])
    rows = logits[len(context) - 1 : -1].double().log_softmax(-1)
    total = sum(float(row[token]) for row, token in zip(rows, continuation, strict=True))
    return total, rows.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("batch_size", [1, 5])
def test_log_likelihoods_are_transformers_own(url: str, folder: Path, batch_size: int) -> None:
    greedy = []
    for context, _ in ITEMS[:3]:  # so that some are what greedy decoding says
        (logits,) = oracle_logits(folder, [context])
        greedy.append((context, [int(logits[-1].argmax())]))
    items, found = [*ITEMS, *greedy], []
    for first in range(0, len(items), batch_size):
        part = items[first : first + batch_size]
        answer = httpx.post(url + "/v1/completions", json=asked([context + rest for context, rest in part])).json()
        found += read(answer, [len(context) for context, _ in part])
    reference = [expected(folder, *item) for item in items]
    assert [each[0] for each in found] == pytest.approx([each[0] for each in reference], abs=1e-4)
    assert [each[1] for each in found] == [each[1] for each in reference]
    assert {each[1] for each in found} == {True, False}
