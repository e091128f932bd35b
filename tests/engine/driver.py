"""Drives a core step by step and collects what it answers."""

from __future__ import annotations

import time
from collections import defaultdict

from tabstop.types import Limits, Sampling, Submit, pack_ids

GREEDY = Sampling(temperature=0)


class Driver:
    """Steps a core, checks every invariant after each step, and collects outputs by (request, sample)."""

    def __init__(self, core):
        self.core, self.pending, self.now, self.counter = core, None, 0.0, 0
        self.tokens = defaultdict(list)
        self.finish = {}
        self.deltas = {}
        self.logprobs = defaultdict(list)
        self.prompts = defaultdict(list)  # of each request, what was said of its prompt

    def add(self, prompt, max_tokens=8, *, sampling=GREEDY, num_samples=1, limits=None, **more):
        self.counter += 1
        limits = limits or Limits(max_tokens=max_tokens, stop_sets=())
        self.core.add(
            Submit((0, self.counter), pack_ids(prompt), sampling, limits, num_samples=num_samples, **more), self.now
        )
        return (0, self.counter)

    def step(self):
        self.now += 0.01
        self.pending, deltas = self.core.step(self.pending, self.now)
        for delta in deltas:
            key = (delta.request_id, delta.sample)
            assert key not in self.finish, "a delta after the terminal one"
            if delta.prompt_logprobs:
                samples = (other for other in self.tokens if other[0] == delta.request_id)
                assert not any(self.tokens[other] for other in samples), "a token before the whole prompt"
            self.prompts[delta.request_id] += delta.prompt_logprobs
            self.tokens[key] += delta.token_ids
            self.logprobs[key] += delta.logprobs
            self.deltas[key] = delta
            if delta.finish:
                self.finish[key] = delta.finish
        self.core.check()

    def run(self, limit=10_000):
        while self.core.num_requests or self.core.has_work() or self.pending:
            if not (self.core.has_work() or self.pending):
                time.sleep(0.001)  # constraints are being compiled
                continue
            self.step()
            limit -= 1
            assert limit, "no progress"
        assert self.core.num_requests == 0
        return self.tokens
