"""The agreeing pairs once more, over the CPU's own kernels: 8-bit inputs, bfloat16 cache, a whole step in one call."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.kernels.cpu.library import refuse
from tests.engine.test_pairs import PROMPTS, all_requests, constrained_requests, outputs
from tests.tiny import tiny_llama, tiny_qwen2

if reason := refuse():
    pytest.skip(reason, allow_module_level=True)

FAST = {"dtype": "auto", "block_size": 16, "num_threads": 2}


@pytest.fixture(scope="module", params=[tiny_llama, tiny_qwen2])
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder) -> list[list[int]]:
    return outputs(folder, all_requests(), one_by_one=True, prefix_cache=False, **FAST)


def test_the_kernels_are_used(folder):
    core = build_core(EngineConfig(model=str(folder)))
    kernels = core.info.kernels
    core.close()
    assert kernels["attention"] == "cpu" and kernels["steps"] == "one call" and "u8 tiles" in kernels["weights"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched = alone"),
        pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 6}, id="chunked = whole"),
        pytest.param({"num_kv_blocks": 9, "max_model_len": 72}, id="preempted = undisturbed"),
        pytest.param({"block_size": 48}, id="paged = contiguous"),
        pytest.param({"overlap": "on", "max_num_batched_tokens": 9, "max_num_seqs": 5}, id="overlap and chunks"),
        pytest.param({"num_threads": 1}, id="threads"),
    ],
)
def test_pairs(folder, alone, options):
    assert outputs(folder, all_requests(), **FAST | options) == alone


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched = alone"),
        pytest.param({"num_kv_blocks": 9, "max_model_len": 72}, id="preempted = undisturbed"),
        pytest.param({"overlap": "on", "max_num_batched_tokens": 9, "max_num_seqs": 5}, id="overlap and chunks"),
    ],
)
def test_pairs_with_constraints(folder, options):
    alone = outputs(folder, constrained_requests(), one_by_one=True, prefix_cache=False, **FAST)
    assert outputs(folder, constrained_requests(), **FAST | options) == alone


def test_cached_equals_cold(folder, alone):
    again = outputs(folder, all_requests() + all_requests(), one_by_one=True, **FAST)
    assert again == alone + alone


def test_forked_equals_separate(folder):
    """n samples of one prompt share blocks, the last of which is copied."""
    request = (PROMPTS[3], all_requests()[1][1], {"num_samples": 3})
    forked = outputs(folder, [request], **FAST)
    separate = outputs(folder, [request], prefix_cache=False, max_num_seqs=1, **FAST)
    assert forked == separate and forked[0] != forked[1]
