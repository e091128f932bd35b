"""Where a card's memory is: the parts that we book against the driver's number, and a pool that the card can bear."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.types import Limits, Sampling, Submit, pack_ids
from tests.tiny import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
]

UTILIZATION = 0.8


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    folder = tiny_llama(tmp_path_factory.mktemp("wide"), num_hidden_layers=8, intermediate_size=4096, **sizes)
    gc.collect()  # the engines of other tests
    options = {"device": "cuda", "gpu_memory_utilization": UTILIZATION, "max_num_waiting": 4000}
    core = build_core(EngineConfig(model=str(folder), **options))
    yield core
    core.close()


def test_the_parts_explain_what_the_driver_counts(core):
    memory = core.info.memory
    assert memory["driver"] == sum(size for part, size in memory.items() if part != "driver")
    assert abs(memory["libraries"]) <= 0.02 * memory["driver"], memory
    assert memory["weights"] >= core.info.weight_bytes
    num_slots = core.info.num_blocks * core.info.block_size
    assert memory["KV cache"] == pytest.approx(num_slots * core.info.kv_bytes_per_token, rel=0.01)


def test_two_thousand_requests_of_all_kinds_stay_below_the_limit(core):
    samplings = [
        Sampling(temperature=0),
        Sampling(temperature=1, top_p=0.9, seed=1),
        Sampling(temperature=1, min_p=0.1, frequency_penalty=1, num_logprobs=20, seed=2),
    ]
    for n in range(2000):
        prompt = pack_ids([n % 250] * (1 + n % 100))
        core.add(Submit((0, n), prompt, samplings[n % 3], Limits(max_tokens=8, stop_sets=())), 0.0)
    pending, num_tokens = None, Counter()
    while core.has_work() or pending:
        pending, deltas = core.step(pending, 0.0)
        for delta in deltas:
            assert delta.failure is None
            num_tokens[delta.request_id] += len(delta.token_ids)
    assert len(num_tokens) == 2000 and set(num_tokens.values()) == {8}
    free, total = torch.cuda.mem_get_info()
    assert (total - free) / total <= UTILIZATION + 0.01
