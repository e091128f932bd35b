"""Threads that fill masks: all jobs are done, errors stay with their job, and one that takes too long is left."""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
import pytest

from tabstop import grammar
from tabstop.engine.masks import JOBS_PER_THREAD, MaskFillers
from tabstop.grammar import GrammarLimits, Vocabulary
from tabstop.types import ConstraintSpec, FinishReason
from tests.engine.driver import GREEDY, Driver
from tests.engine.simulated import VOCAB, expected_output, make_core


@pytest.fixture
def fillers():
    fillers = MaskFillers(0.05)
    fillers._num_threads = 3
    yield fillers
    fillers.close()


def test_every_job_is_done_once(fillers):
    for num in (1, 2, JOBS_PER_THREAD, 5 * JOBS_PER_THREAD):
        done: list[int] = []
        errors = fillers.run([partial(done.append, n) for n in range(num)])
        assert sorted(done) == list(range(num)) and errors == [None] * num
    assert len(fillers._fillers) == 3


def test_an_error_is_that_of_its_job(fillers):
    def job(number):
        assert number % 3

    errors = fillers.run([lambda n=n: job(n) for n in range(20)])
    assert [isinstance(error, AssertionError) for error in errors] == [n % 3 == 0 for n in range(20)]


class Spinning:
    """Uses a core until it is told to stop; other threads run meanwhile, as beside llguidance."""

    def __init__(self):
        self.may_end, self.ended = threading.Event(), threading.Event()

    def __call__(self):
        while not self.may_end.is_set():
            sum(range(1000))
            time.sleep(0)
        self.ended.set()


def test_a_job_without_end_is_left_and_the_others_are_done(fillers):
    spinning, done = Spinning(), []
    jobs = [lambda n=n: done.append(n) for n in range(30)]
    jobs[3] = spinning
    errors = fillers.run(jobs)
    assert "over 0.05 seconds for one token" in str(errors[3]) and not spinning.ended.is_set()
    assert len(done) == 29 and [error for error in errors if error] == [errors[3]]
    assert fillers.run([lambda: done.append(30)] * 20) == [None] * 20
    num_threads = threading.active_count()
    spinning.may_end.set()
    assert spinning.ended.wait(30)
    while threading.active_count() >= num_threads:  # the thread that was left ends, too
        time.sleep(0.001)


def test_waiting_for_a_core_is_no_fault(fillers):
    assert fillers.run([lambda: time.sleep(0.2)]) == [None]


class Endless:
    """A constraint whose third mask never comes."""

    spinning = Spinning()

    def __init__(self, value, vocabulary, before):
        self.accepted = 0

    def fill(self, mask, ends):
        if self.accepted == 2:
            self.spinning()

    def accept(self, token_id):
        self.accepted += 1

    released = ended = False

    def fork(self):
        return Endless(None, None, b"")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_mask_that_never_comes_ends_its_own_request_only(monkeypatch, overlap):
    monkeypatch.setitem(grammar.KINDS, "endless", Endless)
    monkeypatch.setattr(Endless, "spinning", Spinning())
    core = make_core(overlap=overlap)
    core._fillers = MaskFillers(0.05)
    core.vocabulary = Vocabulary(VOCAB, limits=GrammarLimits(mask_seconds=0.05))
    driver = Driver(core)
    slow = driver.add([1, 2], 20, constraints=(ConstraintSpec("endless"),))
    other = driver.add([1, 2, 3], 20)
    driver.run()
    assert driver.finish[slow, 0] is FinishReason.ERROR and len(driver.tokens[slow, 0]) == 2
    assert driver.deltas[slow, 0].failure.code == "invalid_request"
    assert driver.tokens[other, 0] == expected_output([1, 2, 3], 20, GREEDY)
    Endless.spinning.may_end.set()
    core.close()


class Whole:
    """A constraint that is complete after some tokens, and lets a sample end from the second one on."""

    def __init__(self, value, vocabulary=None, before=b"", accepted=0):
        self.value, self.accepted = value, accepted

    def fill(self, mask, ends):
        mask[:] = 0
        mask[0] = np.int32(0b1000)  # token 3
        if self.accepted >= 2:
            for token_id in ends.tolist():
                mask[token_id // 32] |= np.int32(1 << token_id % 32)

    def accept(self, token_id):
        assert token_id == 3, "a token that ends a sample is no part of its text"
        self.accepted += 1

    released = False

    @property
    def ended(self):
        return self.accepted == self.value

    def fork(self):
        return Whole(self.value, accepted=self.accepted)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_tokens", [5, 20])
def test_a_complete_sample_ends_at_once_and_keeps_its_last_token(monkeypatch, overlap, max_tokens):
    """Also at its last token, and with end tokens that count for nothing."""
    monkeypatch.setitem(grammar.KINDS, "whole", Whole)
    driver = Driver(make_core(overlap=overlap))
    key = driver.add([1, 2], max_tokens, constraints=(ConstraintSpec("whole", 5),), num_samples=2)
    driver.run()
    for sample in range(2):
        assert driver.tokens[key, sample] == [3] * 5 and driver.finish[key, sample] is FinishReason.STOP
        assert driver.deltas[key, sample].stop_token_id is None
