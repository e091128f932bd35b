"""The agreeing pairs over a real (tiny, random) model: whatever shares a step with a request, its tokens stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabstop.config import EngineConfig
from tabstop.engine.build import build_core
from tabstop.grammar.specs import choice_constraint, json_schema_constraint, lark_constraint, regex_constraint
from tabstop.types import CachePolicy, ConstraintSpec, Limits, Sampling
from tests.engine.driver import Driver
from tests.tiny import tiny_llama

PROMPTS = [[(n * 37 + at * at) % 250 for at in range(5 + 9 * n)] for n in range(6)]
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=1, seed=4, frequency_penalty=3, presence_penalty=2),
    Sampling(temperature=0.7, seed=5, top_k=20),
    Sampling(temperature=0, repetition_penalty=2, num_logprobs=3),
    Sampling(temperature=1, seed=4, banned=((7,), (9, 3)), min_p=0.01, logit_bias=((11, 4.0), (9, 5.0), (3, 5.0))),
    Sampling(temperature=1, seed=6, typical_p=0.9, repetition_penalty=1.5, penalty_window=6),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def outputs(folder: Path, requests, *, one_by_one: bool = False, **options) -> list[list[int]]:
    """Tokens of each request's samples, in order."""
    options = {"max_model_len": 128, "num_kv_blocks": 256, "block_size": 4, "max_num_batched_tokens": 512} | options
    core = build_core(EngineConfig(model=str(folder), **{"num_threads": 1, "dtype": "float32"} | options))
    driver, keys = Driver(core), []
    for prompt, sampling, more in requests:
        key = driver.add(prompt, 16, sampling=sampling, **more)
        keys += [(key, sample) for sample in range(more.get("num_samples", 1))]
        if one_by_one:
            driver.run()
    driver.run()
    core.close()
    return [driver.tokens[key] for key in keys]


def all_requests(**more):
    return [(prompt, SAMPLINGS[n], more) for n, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def alone(folder) -> list[list[int]]:
    """The plain way: one at a time, whole prompts, nothing cached."""
    return outputs(folder, all_requests(), one_by_one=True, prefix_cache=False)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched = alone"),
        pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 6}, id="chunked = whole"),
        pytest.param({"num_kv_blocks": 36, "block_size": 2, "max_model_len": 72}, id="preempted = undisturbed"),
        pytest.param({"block_size": 16}, id="paged = contiguous"),
        pytest.param({"overlap": "on"}, id="overlap on = off"),
        pytest.param({"overlap": "on", "max_num_batched_tokens": 9, "max_num_seqs": 5}, id="overlap and chunks"),
    ],
)
def test_pairs(folder, alone, options):
    assert outputs(folder, all_requests(), **options) == alone


def test_cached_equals_cold(folder, alone):
    again = outputs(folder, all_requests() + all_requests(), one_by_one=True)
    assert again == alone + alone


def test_forked_equals_separate(folder):
    """n samples of one request are what n requests with the same seed and no sharing would be."""
    sampling = Sampling(temperature=1, seed=11)
    uncached = {"cache": CachePolicy(read=False, write=False)}
    forked = outputs(folder, [(PROMPTS[3], sampling, {"num_samples": 3, **uncached})])
    separate = [outputs(folder, [(PROMPTS[3], sampling, {"num_samples": n + 1, **uncached})])[n] for n in range(3)]
    assert forked == separate and forked[0] != forked[1]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    (json_schema_constraint(SCHEMA),),
    (regex_constraint("[a-z]{3,9}( [a-z]+)*"),),
    (),
    (ConstraintSpec("healing", b"re".hex()), choice_constraint(["turn x", "turns nothing", "d"])),
    (json_schema_constraint({"type": "array", "items": {"type": "integer"}}),),
    (lark_constraint('start: ("import " NAME "\\n")+\nNAME: /[a-z]+/'),),
]


def constrained_requests():
    """Each of PROMPTS with another constraint, in two samples, which may end."""
    limits = Limits(16, min_tokens=3)
    return [
        (prompt, SAMPLINGS[n], {"constraints": CONSTRAINTS[n], "num_samples": 2, "limits": limits})
        for n, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def constrained_alone(folder) -> list[list[int]]:
    return outputs(folder, constrained_requests(), one_by_one=True, prefix_cache=False)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched = alone"),
        pytest.param({"max_num_batched_tokens": 7, "max_num_seqs": 6}, id="chunked = whole"),
        pytest.param({"num_kv_blocks": 40, "block_size": 2, "max_model_len": 72}, id="preempted = undisturbed"),
        pytest.param({"overlap": "on"}, id="overlap on = off"),
        pytest.param({"overlap": "on", "max_num_batched_tokens": 9, "max_num_seqs": 5}, id="overlap and chunks"),
    ],
)
def test_pairs_with_constraints(folder, constrained_alone, options):
    assert outputs(folder, constrained_requests(), **options) == constrained_alone
    assert outputs(folder, all_requests(), **options) != constrained_alone[::2]


def test_constrained_samples_are_preempted(folder):
    """What the pair above relies on."""
    core = build_core(EngineConfig(model=str(folder), num_threads=1, num_kv_blocks=40, block_size=2, max_model_len=72))
    driver = Driver(core)
    for prompt, sampling, more in constrained_requests():
        driver.add(prompt, sampling=sampling, **more)
    driver.run()
    assert core.stats().num_preemptions > 0
    core.close()


def test_stop_sets_come_from_the_checkpoint(folder):
    core = build_core(EngineConfig(model=str(folder), num_threads=1, max_model_len=64))
    assert core.stop_sets["eos"] and core.stop_sets["newline"]
    driver = Driver(core)
    key = driver.add(PROMPTS[1], limits=Limits(40, stop_token_ids=tuple(range(0, 250, 2))))
    driver.run()
    assert driver.deltas[key, 0].stop_token_id == driver.tokens[key, 0][-1]
    core.close()
