"""The engine core over simulated workers: agreeing pairs, endings, and the ledger after every step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabstop import grammar
from tabstop.engine.core import MIN_DEADLINES
from tabstop.types import (
    Abort,
    CachePolicy,
    ConstraintSpec,
    FinishReason,
    Limits,
    Priority,
    Sampling,
    Stage,
)
from tests.engine.driver import GREEDY, Driver
from tests.engine.simulated import VOCAB, expected_output, expected_prompt, make_core

ids = st.integers(0, VOCAB - 1)
requests = st.fixed_dictionaries(
    {
        "shared": st.integers(0, 24),  # tokens taken from a common start
        "own": st.lists(ids, min_size=1, max_size=20),
        "max_tokens": st.integers(0, 12),
        "num_samples": st.integers(1, 3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "priority": st.sampled_from(list(Priority)),
        "scope": st.sampled_from(["", "other"]),
        "steps_before": st.integers(0, 5),
        "abort_after": st.one_of(st.none(), st.integers(0, 8)),
        "stops": st.sampled_from([(), ("eos",), ("newline",)]),
        "num_prompt_logprobs": st.sampled_from([None, None, 0, 2]),
    }
)
COMMON = [(7 * n) % VOCAB for n in range(24)]
STOPS = {"eos": {0}, "newline": {1, 2}}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=10),
    st.integers(1, 5),
    st.integers(8, 40),
    st.integers(1, 6),
    st.integers(6, 24),
    st.booleans(),
    st.booleans(),
)
def test_any_schedule_gives_every_request_its_own_tokens(
    script, block_size, num_blocks, max_num_seqs, budget, overlap, prefix_cache
):
    """batched = alone, chunked = whole, cached = cold, preempted = undisturbed, overlap on = off."""
    num_blocks = max(num_blocks, -(-60 // block_size))
    core = make_core(num_blocks, block_size, max_num_seqs, budget, 60, overlap, prefix_cache)
    driver, expected, expected_prompts, aborted = Driver(core), {}, {}, {}
    for entry in script:
        for _ in range(entry["steps_before"]):
            driver.step()
        prompt = COMMON[: entry["shared"]] + entry["own"]
        num_top = entry["num_prompt_logprobs"]
        sampling = Sampling(temperature=entry["temperature"], seed=5, num_prompt_logprobs=num_top)
        key = driver.add(
            prompt,
            sampling=sampling,
            num_samples=entry["num_samples"],
            limits=Limits(entry["max_tokens"], stop_sets=entry["stops"]),
            priority=entry["priority"],
            cache=CachePolicy(scope=entry["scope"]),
        )
        stops = frozenset(token for name in entry["stops"] for token in STOPS[name])
        expected_prompts[key] = [] if num_top is None else expected_prompt(prompt, num_top)
        for sample in range(entry["num_samples"]):
            expected[key, sample] = expected_output(prompt, entry["max_tokens"], sampling, sample, stops)
        if entry["abort_after"] is not None:
            for _ in range(entry["abort_after"]):
                driver.step()
            core.abort(Abort(key))
            aborted[key] = True
    driver.run()
    for (key, sample), tokens in expected.items():
        if driver.finish[key, sample] is FinishReason.ABORT:
            assert aborted[key] and driver.tokens[key, sample] == tokens[: len(driver.tokens[key, sample])]
        else:
            assert driver.tokens[key, sample] == tokens
    for key, entries in expected_prompts.items():
        assert driver.prompts[key] == (entries[: len(driver.prompts[key])] if key in aborted else entries)


def test_a_pool_of_64_blocks_at_four_times_its_demand_finishes_all():
    core = make_core(num_blocks=64, block_size=4, max_num_seqs=32, max_num_batched_tokens=64, max_model_len=128)
    driver = Driver(core)
    prompts = [[(n * 31 + at) % VOCAB for at in range(20)] for n in range(32)]  # 32 x 32 tokens = 4 x 256
    keys = [driver.add(prompt, 12) for prompt in prompts]
    driver.run()
    for key, prompt in zip(keys, prompts, strict=True):
        assert driver.tokens[key, 0] == expected_output(prompt, 12, GREEDY)
    assert core.scheduler.counters.num_preemptions > 0


def test_equal_prompts_compute_once():
    core = make_core(num_blocks=256, block_size=4, max_num_seqs=64, max_num_batched_tokens=4096)
    driver = Driver(core)
    prompt = [n % VOCAB for n in range(41)]
    for _ in range(64):
        driver.add(prompt, 1)
    driver.run()
    assert core.workers.num_computed_tokens == 41 + 63  # the 64 find 40 tokens in the same step


@pytest.mark.parametrize("extra", [[], [3]])
def test_the_same_prompt_again_computes_almost_nothing(extra):
    """Whole blocks are shared and the unfinished one is copied up to its longest common start."""
    core = make_core(num_blocks=64, block_size=16, max_num_batched_tokens=512, max_model_len=1024)
    driver = Driver(core)
    prompt = [(n * n) % VOCAB for n in range(1000 - 24)]
    driver.add(prompt, 4)
    driver.run()
    key = driver.add(prompt + extra, 4)
    driver.run()
    assert len(prompt + extra) - driver.deltas[key, 0].num_cached_tokens <= 1 + len(extra)
    assert driver.tokens[key, 0] == expected_output(prompt + extra, 4, GREEDY)


def test_a_prompt_that_is_still_answered_is_shared_to_its_last_token():
    core = make_core(num_blocks=64, block_size=16, max_num_batched_tokens=512, max_model_len=1024)
    driver = Driver(core)
    prompt = [(n * n) % VOCAB for n in range(45)]
    driver.add(prompt, 30)
    for _ in range(3):
        driver.step()
    key = driver.add(prompt, 4)
    driver.run()
    assert driver.deltas[key, 0].num_cached_tokens == 44
    assert driver.tokens[key, 0] == expected_output(prompt, 4, GREEDY)


def test_scopes_never_share():
    core = make_core(block_size=4, num_blocks=64)
    driver = Driver(core)
    prompt = list(range(30))
    for scope in ("one", "two"):
        driver.add(prompt, 2, cache=CachePolicy(scope=scope))
        driver.run()
    assert core.scheduler.counters.num_cached_tokens == 0


def test_candidates_of_a_seed_differ_and_repeat():
    outputs = []
    for _ in range(2):
        driver = Driver(make_core())
        key = driver.add([5, 6, 7], 10, sampling=Sampling(temperature=1, seed=9), num_samples=4)
        driver.run()
        outputs.append([driver.tokens[key, n] for n in range(4)])
    assert outputs[0] == outputs[1]
    assert len({tuple(tokens) for tokens in outputs[0]}) == 4


def test_samples_share_their_prompt():
    core = make_core(block_size=4)
    driver = Driver(core)
    driver.add(list(range(22)), 3, num_samples=4, cache=CachePolicy(read=False, write=False))
    driver.run()
    assert core.workers.num_computed_tokens <= 22 + 4 * 3


def test_decoding_goes_on_beside_a_long_prompt():
    core = make_core(max_num_batched_tokens=8, max_model_len=128)
    driver = Driver(core)
    stream = driver.add([1, 2, 3], 20)
    driver.step()
    driver.step()
    driver.add([n % VOCAB for n in range(80)], 1)
    for _ in range(8):
        before = len(driver.tokens[stream, 0])
        driver.step()
        assert len(driver.tokens[stream, 0]) == before + 1


def test_higher_class_runs_first_and_takes_a_slot():
    core = make_core(max_num_seqs=1)
    driver = Driver(core)
    background = driver.add([1, 2], 30, priority=Priority.BACKGROUND)
    driver.step()
    normal = driver.add([3, 4], 3)
    interactive = driver.add([5, 6], 3, priority=Priority.INTERACTIVE)
    driver.run()
    assert list(driver.finish) == [(interactive, 0), (normal, 0), (background, 0)]
    assert driver.tokens[background, 0] == expected_output([1, 2], 30, GREEDY)


def test_a_deadline_ends_a_request_with_what_it_has():
    driver = Driver(make_core())
    key = driver.add([1, 2], 50, limits=Limits(50, stop_sets=(), deadline_ms=65))
    driver.run()
    assert driver.finish[key, 0] is FinishReason.DEADLINE and 0 < len(driver.tokens[key, 0]) < 50


def test_deadlines_of_ended_requests_are_forgotten():
    core = make_core()
    driver = Driver(core)
    for _ in range(3 * MIN_DEADLINES):
        driver.add([1, 2], limits=Limits(1, stop_sets=(), deadline_ms=10**9))
        driver.run()
    assert len(core._deadlines) <= MIN_DEADLINES + 2


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_min_tokens_come_before_the_stop_token(min_tokens):
    driver = Driver(make_core())
    key = driver.add([1, 2], limits=Limits(9, min_tokens, stop_sets=(), stop_token_ids=tuple(range(VOCAB))))
    driver.run()
    assert len(driver.tokens[key, 0]) == min_tokens + 1 and driver.finish[key, 0] is FinishReason.STOP


def test_who_waits_too_long_is_refused_and_who_has_begun_stays():
    driver = Driver(make_core(num_blocks=32, block_size=4, max_num_seqs=1))

    def add(queue_ms, **more):
        return driver.add([1, 2, 3], limits=Limits(max_tokens=20, stop_sets=(), queue_ms=queue_ms), **more)

    first, second, third = add(25), add(25, num_samples=3), add(10_000)
    driver.run()
    assert driver.finish[first, 0] is FinishReason.LENGTH  # took eight times as long
    for sample in range(3):
        assert driver.finish[second, sample] is FinishReason.ERROR
        assert driver.deltas[second, sample].failure.code == "overloaded" and not driver.tokens[second, sample]
    assert driver.finish[third, 0] is FinishReason.LENGTH and len(driver.tokens[third, 0]) == 20


def test_a_preempted_request_is_no_longer_in_the_queue():
    """The pool holds one of them: the second begins, is sent back, waits longer than the queue's limit, ends well."""
    driver = Driver(make_core(num_blocks=10, block_size=4, max_num_seqs=2))
    limits = Limits(max_tokens=24, stop_sets=(), queue_ms=100)
    requests = [driver.add([n, 2, 3], limits=limits) for n in (1, 5)]
    driver.run()
    assert driver.core.stats().num_preemptions > 0
    assert [driver.finish[request, 0] for request in requests] == [FinishReason.LENGTH] * 2


def test_min_tokens_passes_stop_tokens():
    for min_tokens in (0, 40):
        driver = Driver(make_core())
        limits = Limits(60, min_tokens=min_tokens, stop_sets=("newline",), stop_token_ids=tuple(range(3, 40)))
        key = driver.add([1, 2], limits=limits)
        driver.run()
        num_tokens = len(driver.tokens[key, 0])
        assert driver.deltas[key, 0].stop_token_id == driver.tokens[key, 0][-1]
        assert num_tokens >= min_tokens and (min_tokens or num_tokens < 40)


def test_requests_are_counted_apart_from_their_samples():
    core = make_core(max_num_seqs=3)
    driver = Driver(core)

    def counts() -> tuple[int, int, int, int]:
        stats = core.stats()
        return (
            stats.num_requests_running,
            stats.num_requests - stats.num_requests_running,
            stats.num_running,
            stats.num_waiting,
        )

    driver.add([1, 2], 8, num_samples=2)
    driver.add([3, 4], 8, num_samples=2)
    assert counts() == (0, 2, 0, 2)
    while core.stats().num_running < 3:
        driver.step()
    assert counts() == (2, 0, 3, 1)  # a sample of the second has no slot
    driver.add([5, 6], 8)
    assert counts() == (2, 1, 3, 2)
    driver.run()
    assert counts() == (0, 0, 0, 0)


def test_what_cannot_be_served_is_refused_with_one_terminal_delta():
    core = make_core(num_blocks=8, block_size=4, max_num_waiting=2)
    assert core.info.max_num_waiting == 2  # front ends are told
    driver = Driver(core)
    too_long = driver.add(list(range(30)), 8)
    outside = driver.add([VOCAB], 2)
    empty = driver.add([], 2)
    unknown_set = driver.add([1], limits=Limits(2, stop_sets=("nothing",)))
    adapter = driver.add([1], 2, adapter="x")
    draws = [
        driver.add([1], 2, sampling=Sampling(**wrong))
        for wrong in (
            {"logit_bias": ((VOCAB, 1.0),)},
            {"logit_bias": ((1, float("nan")),)},
            {"allowed_token_ids": (0, VOCAB)},
            {"allowed_token_ids": (4,), "banned": ((4,),)},
            {"banned": ((1, -1),)},
            {"banned": ((),)},
            {"repetition_penalty": 0.0},
            {"min_p": 1.5},
            {"num_logprobs": 21},
        )
    ]
    waiting = [driver.add([1], 2) for _ in range(3)]
    driver.run()
    assert driver.deltas[too_long, 0].failure.code == "context_length_exceeded"
    for key in (outside, empty, unknown_set, adapter, *draws):
        assert driver.deltas[key, 0].failure.code == "invalid_request"
    assert driver.deltas[waiting[2], 0].failure.code == "overloaded"
    assert driver.finish[waiting[1], 0] is FinishReason.LENGTH


def test_a_dead_front_end_frees_everything():
    core = make_core()
    driver = Driver(core)
    driver.add([1, 2, 3], 50, num_samples=3)
    driver.step()
    driver.step()
    core.abort_front_end(0)
    driver.step()
    assert core.num_requests == 0 and core.scheduler.ledger().used == 0


class OnlyEven:
    """The trivial constraint of these tests: even tokens, for the first `num_tokens` tokens."""

    def __init__(self, num_tokens, vocab_size, before=b""):
        self.num_tokens, self.vocab_size, self.accepted = num_tokens, vocab_size, []

    def fill(self, mask, ends):
        mask &= np.int32(0x55555555)

    def accept(self, token_id):
        assert token_id % 2 == 0
        self.accepted.append(token_id)

    def rollback(self, num_tokens):
        del self.accepted[-num_tokens:]

    @property
    def released(self):
        return len(self.accepted) >= self.num_tokens

    @property
    def ended(self):
        return False

    def fork(self):
        return OnlyEven(self.num_tokens, self.vocab_size)


@pytest.fixture
def only_even(monkeypatch):
    monkeypatch.setitem(grammar.KINDS, "even", OnlyEven)


@pytest.mark.parametrize("overlap", [False, True])
def test_constraints_mask_every_sample_until_released(only_even, overlap):
    driver = Driver(make_core(overlap=overlap, num_blocks=24))
    specs = (ConstraintSpec("even", 10),)
    keys = [driver.add([1, 2, n], 20, num_samples=2, constraints=specs) for n in range(4)]
    free = driver.add([1, 2, 3], 20)
    driver.run()
    for key in keys:
        for sample in range(2):
            tokens = driver.tokens[key, sample]
            assert all(token % 2 == 0 for token in tokens[:10]) and any(token % 2 for token in tokens[10:])
    assert driver.tokens[free, 0] == expected_output([1, 2, 3], 20, GREEDY)


def test_a_constraint_that_does_not_compile_is_the_clients_error():
    driver = Driver(make_core())
    key = driver.add([1], 4, constraints=(ConstraintSpec("no such kind"),), num_samples=2)
    driver.run()
    assert driver.deltas[key, 1].failure.code == "invalid_request"


def test_abort_while_compiling_ends_every_sample():
    from concurrent.futures import Future

    class Never:
        def submit(self, *_):
            return Future()

        def shutdown(self, **_):
            pass

    core = make_core(compiler=Never())
    driver = Driver(core)
    key = driver.add([1], 4, constraints=(ConstraintSpec("x"),), num_samples=2)
    driver.step()
    core.abort(Abort(key))
    driver.step()
    assert driver.finish == {(key, 0): FinishReason.ABORT, (key, 1): FinishReason.ABORT}
    assert core.stats().aborts == {"compiling": 2} and core.num_requests == 0


def test_an_abort_at_any_stage_frees_everything_and_is_counted_there():
    core = make_core(max_num_seqs=1, max_num_batched_tokens=4)
    driver = Driver(core)
    decoding = driver.add([1, 2], 30)
    for _ in range(3):
        driver.step()
    core.abort(Abort(decoding))
    prompt = driver.add([n + 3 for n in range(20)], 30)
    driver.step()
    waiting = driver.add([1], 30)
    core.abort(Abort(prompt))
    core.abort(Abort(waiting))
    driver.step()
    assert core.stats().aborts == {Stage.DECODING: 1, Stage.PROMPT: 1, Stage.WAITING: 1}
    assert core.num_requests == 0 and core.scheduler.ledger().used == 0
    driver.run()
    assert set(driver.finish.values()) == {FinishReason.ABORT} and len(driver.finish) == 3


def test_aborting_one_sample_leaves_the_others():
    core = make_core()
    driver = Driver(core)
    key = driver.add([4, 5, 6], 12, sampling=Sampling(temperature=1, seed=3), num_samples=3)
    for _ in range(4):
        driver.step()
    core.abort(Abort(key, samples=(0, 2)))
    driver.run()
    assert driver.finish[key, 0] is driver.finish[key, 2] is FinishReason.ABORT
    assert driver.tokens[key, 1] == expected_output([4, 5, 6], 12, Sampling(temperature=1, seed=3), 1)


def test_prompt_only_requests_compute_and_end():
    core = make_core()
    driver = Driver(core)
    key = driver.add(list(range(40)), 0)
    driver.run()
    assert driver.finish[key, 0] is FinishReason.LENGTH and driver.tokens[key, 0] == []
    assert core.workers.num_computed_tokens == 40


def test_what_is_in_hand_is_noted_before_it_is_computed():
    """Whoever looks after the engine died finds the request that was begun last."""
    core = make_core(max_num_seqs=2)
    driver, noted = Driver(core), []
    launch, core.note = core.workers.launch, noted.append
    seen = []

    def launching(plan):
        seen.append(noted[-1])
        return launch(plan)

    core.workers.launch = launching
    keys = [driver.add([1, 2, n], 4) for n in range(4)]
    driver.run()
    assert seen[0] == keys[:2] and seen[-1] == keys[2:]
    constrained = driver.add([1, 2], 4, constraints=(ConstraintSpec("unheard of", 1),))
    assert noted[-1] == [constrained]
    driver.run()


class Faulty(OnlyEven):
    """Fails or forbids everything at its third token."""

    fault = "fill"

    def fill(self, mask, ends):
        if len(self.accepted) == 2 and self.fault == "fill":
            raise RuntimeError("broken")
        if len(self.accepted) == 2 and self.fault == "nothing allowed":
            mask[:] = 0
        super().fill(mask, ends)

    def accept(self, token_id):
        super().accept(token_id)
        if len(self.accepted) == 3 and self.fault == "accept":
            raise RuntimeError("broken")

    def fork(self):
        return type(self)(self.num_tokens, self.vocab_size)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("fault", "code"),
    [("fill", "internal_error"), ("accept", "internal_error"), ("nothing allowed", "invalid_request")],
)
def test_a_faulty_constraint_ends_its_own_request_only(monkeypatch, overlap, fault, code):
    monkeypatch.setattr(Faulty, "fault", fault)
    monkeypatch.setitem(grammar.KINDS, "faulty", Faulty)
    driver = Driver(make_core(overlap=overlap))
    faulty = driver.add([1, 2], 20, constraints=(ConstraintSpec("faulty", 10),))
    other = driver.add([1, 2, 3], 20)
    driver.run()
    assert driver.finish[faulty, 0] is FinishReason.ERROR and driver.deltas[faulty, 0].failure.code == code
    assert driver.tokens[other, 0] == expected_output([1, 2, 3], 20, GREEDY)
