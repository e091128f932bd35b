"""The sampler against plain references in float64, and that neighbours do not matter."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from msgspec import structs

from tabstop.engine.plan import Admission
from tabstop.sampling import steps
from tabstop.sampling.random import uniform
from tabstop.sampling.sampler import Sampler
from tabstop.types import Sampling

VOCAB = 50
PROMPT, OUTPUT = [3, 3, 8, 41, 12], [7, 8, 7, 20, 33, 7]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def penalised(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """float64 [vocab] after PROMPT and OUTPUT: masks, biases and penalties, one token at a time."""
    result = logits.astype(np.float64)
    window = (PROMPT + OUTPUT)[-sampling.penalty_window :] if sampling.penalty_window else None
    for token in range(VOCAB):
        result[token] += sum(bias for biased, bias in sampling.logit_bias if biased == token)
        if token in (PROMPT + OUTPUT if window is None else window):
            result[token] *= sampling.repetition_penalty ** (1 if result[token] <= 0 else -1)
        count = (OUTPUT if window is None else window).count(token)
        result[token] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        if sampling.allowed_token_ids and token not in sampling.allowed_token_ids:
            result[token] = -np.inf
        if any(run[-1] == token and [*OUTPUT, token][-len(run) :] == list(run) for run in sampling.banned):
            result[token] = -np.inf
    return result


def most_typical(probabilities: np.ndarray, mass: float) -> np.ndarray:
    """float64 [vocab] → zero but for the tokens of locally typical sampling."""
    entropy = -sum(p * np.log(p) for p in probabilities if p > 0)
    surprise = [abs(-np.log(p) - entropy) if p > 0 else np.inf for p in probabilities]
    kept, total = np.zeros(VOCAB), 0.0
    for token in sorted(range(VOCAB), key=surprise.__getitem__):
        kept[token] = probabilities[token]
        total += probabilities[token]
        if total >= mass:
            break
    return kept / kept.sum()


def reference_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """float64 [vocab] → the probabilities that a row is drawn from, by the definitions."""
    scaled = penalised(logits, sampling) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities[probabilities < sampling.min_p] = 0
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    keep = np.zeros(len(logits), bool)
    if sampling.top_k:
        order = order[: sampling.top_k]
        probabilities = probabilities / probabilities[order].sum()
    total = 0.0
    for token in order:
        keep[token] = True
        total += probabilities[token]
        if total >= sampling.top_p:
            break
    kept = np.where(keep, probabilities, 0)
    kept = kept / kept.sum()
    return kept if sampling.typical_p == 1 else most_typical(kept, sampling.typical_p)


def sample_rows(logits: torch.Tensor, samplings: list[Sampling], positions: np.ndarray, masks=None) -> np.ndarray:
    sampler = Sampler(len(samplings))
    sampler.admit(Admission(slot, sampling, 0) for slot, sampling in enumerate(samplings))
    return sampler.sample(logits, np.arange(len(samplings)), positions, masks).numpy()


def after_history(samplings: list[Sampling]) -> Sampler:
    """Slots whose sequences have PROMPT, and OUTPUT up to the next token."""
    sampler, history = Sampler(len(samplings)), array("I", PROMPT + OUTPUT)
    for slot, sampling in enumerate(samplings):
        sampler.admit([Admission(slot, sampling, slot, len(PROMPT), history if sampling.looks_back else None)])
    return sampler


NEXT = len(PROMPT) + len(OUTPUT)
"""The position that after_history's sequences draw."""

LOOKING_BACK = [
    Sampling(temperature=1.0, seed=1, repetition_penalty=1.7),
    Sampling(temperature=0.9, seed=2, presence_penalty=1.5),
    Sampling(temperature=1.1, seed=3, frequency_penalty=0.6),
    Sampling(temperature=1.0, seed=4, frequency_penalty=-0.5, presence_penalty=-1.0, repetition_penalty=0.6),
    Sampling(temperature=1.0, seed=5, repetition_penalty=1.3, frequency_penalty=0.2, penalty_window=8),
    Sampling(temperature=1.0, seed=6, banned=((33, 7, 11), (7, 12), (9, 13), (14,), (20, 33, 7, 15))),
]

NEW_STEPS = [
    *LOOKING_BACK,
    Sampling(temperature=1.0, seed=7, min_p=0.2),
    Sampling(temperature=1.4, seed=8, typical_p=0.5),
    Sampling(temperature=1.0, seed=9, logit_bias=((4, 3.0), (9, -100.0), (10, 1.0))),
    Sampling(temperature=1.0, seed=10, allowed_token_ids=(4, 9, 30)),
    Sampling(temperature=0.8, seed=11, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.2),
]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.3, seed=2),
        Sampling(temperature=1.5, seed=3, top_k=7),
        Sampling(temperature=1.0, seed=4, top_p=0.6),
        Sampling(temperature=0.8, seed=5, top_k=10, top_p=0.9),
    ],
)
def test_draws_follow_the_reference_distribution(sampling):
    """Chi-square on 100,000 draws; the bound is the 99.99 % quantile (normal approximation)."""
    num_draws, rows = 100_000, 500
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2
    counts = np.zeros(VOCAB)
    for first in range(0, num_draws, rows):
        repeated = torch.from_numpy(logits).repeat(rows, 1)
        drawn = sample_rows(repeated, [sampling] * rows, np.arange(first, first + rows))
        counts += np.bincount(drawn, minlength=VOCAB)
    assert_follows(counts, reference_distribution(logits, sampling) * num_draws)


def assert_follows(counts: np.ndarray, expected: np.ndarray) -> None:
    assert (counts[expected == 0] == 0).all()
    seen = expected >= 5
    statistic = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    degrees = seen.sum() - 1
    assert statistic < degrees + 3.72 * np.sqrt(2 * degrees) + 10


def test_draws_of_new_steps_follow_the_reference_distribution():
    """As above, every kind of request in the same batch: 100,000 draws each, neighbours of all other kinds."""
    num_draws, copies = 100_000, 200
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 1.5
    samplings = [structs.replace(one, seed=one.seed + 100 * copy) for copy in range(copies) for one in NEW_STEPS]
    sampler, slots = after_history(samplings), np.arange(len(samplings))
    repeated, counts = torch.from_numpy(logits).repeat(len(samplings), 1), np.zeros((len(NEW_STEPS), VOCAB))
    for _ in range(num_draws // copies):
        drawn = sampler.sample(repeated, slots, np.full(len(slots), NEXT), None).numpy()
        np.add.at(counts, (slots % len(NEW_STEPS), drawn), 1)
        sampler._parameters["seed"] += 1_000_000
    for sampling, seen in zip(NEW_STEPS, counts, strict=True):
        assert_follows(seen, reference_distribution(logits, sampling) * num_draws)


def test_greedy_rows_take_the_likeliest_token_after_all_steps():
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)
        greedy = [structs.replace(sampling, temperature=0.0) for sampling in NEW_STEPS]
        repeated = torch.from_numpy(logits).repeat(len(greedy), 1)
        drawn = after_history(greedy).sample(repeated, np.arange(len(greedy)), np.full(len(greedy), NEXT), None)
        expected = [penalised(logits, sampling).argmax() for sampling in greedy]
        assert drawn.tolist() == expected
        assert torch.equal(repeated[0], torch.from_numpy(logits)), "the logits are the caller's"


def test_what_was_drawn_counts_in_the_next_step_wherever_it_was_drawn():
    """A sequence that goes on beside others, one that is admitted again after a preemption, and one alone are equal."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, VOCAB, generator=generator)
    together, tokens = after_history(NEW_STEPS), [list(PROMPT + OUTPUT) for _ in NEW_STEPS]
    for step, row in enumerate(logits):
        slots = np.arange(len(NEW_STEPS))
        repeated = row.repeat(len(slots), 1)
        drawn = together.sample(repeated, slots, np.full(len(slots), NEXT + step), None).tolist()
        for slot, sampling in enumerate(NEW_STEPS):
            again = Sampler(1)
            history = array("I", tokens[slot]) if sampling.looks_back else None
            again.admit([Admission(0, sampling, slot, len(PROMPT), history)])
            alone = again.sample(row[None], np.zeros(1, np.int64), np.array([NEXT + step]), None)
            assert alone.tolist() == [drawn[slot]]
            tokens[slot].append(drawn[slot])
    assert len({tuple(entry) for entry in tokens}) == len(NEW_STEPS)


def test_a_slot_forgets_its_former_owner():
    penalty = Sampling(temperature=0.0, presence_penalty=2.0)
    sampler = Sampler(2)
    logits = torch.zeros(2, VOCAB)
    logits[:, 7], logits[:, 9] = 1, 0.5
    slots = np.arange(2)
    for _ in range(12):  # whatever was written in these slots before
        sampler.admit([Admission(slot, penalty, 0, 1, array("I", [0])) for slot in (0, 1)])
        assert sampler.sample(logits, slots, np.array([1, 1]), None).tolist() == [7, 7]
        assert sampler.sample(logits, slots, np.array([2, 2]), None).tolist() == [9, 9]
    sampler.admit([Admission(0, Sampling(temperature=0.0), 0, 1)])
    assert sampler.sample(logits, slots, np.array([3, 3]), None)[0] == 7


def test_long_histories_of_many_slots_grow():
    sampler = Sampler(40)
    penalty = Sampling(temperature=0.0, frequency_penalty=0.01)
    for slot in range(40):
        sampler.admit([Admission(slot, penalty, 0, 1, array("I", [slot] * (slot + 1) * 30))])
    logits = torch.zeros(40, VOCAB)
    logits[:, 49] = 0.1
    rows = np.arange(40)
    drawn = sampler.sample(logits, rows, (rows + 1) * 30, None)
    assert drawn.tolist() == [49] * 40
    sampler.admit([Admission(39, penalty, 0, 1, array("I", [49] * 2000))])
    assert sampler.sample(logits, rows, np.where(rows == 39, 2000, (rows + 1) * 30 + 1), None)[39] == 0


def test_stop_tokens_wait_for_min_tokens_unless_nothing_else_is_allowed():
    sampler = Sampler(2)
    for slot in range(2):
        sampler.admit([Admission(slot, Sampling(temperature=0.0), 0, 4, None, 3, frozenset({5, 6}))])
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 2] = 9, 8, 1
    masks = np.full((2, 2), -1, np.int32)
    masks[1] = [1 << 6, 0]
    for position, expected in ((4, 2), (6, 2), (7, 5)):
        assert sampler.sample(logits, np.arange(2), np.full(2, position), masks).tolist() == [expected, 6]


def test_a_step_costs_nothing_when_no_row_needs_it(monkeypatch):
    """Each sees only the rows that need it, and draws without any leave the logits where they are."""
    seen: dict[str, int] = {}

    def counting(step):
        def apply(logits, batch):
            name = step.apply.__name__
            seen[name] = seen.get(name, 0) + len(logits)
            return step.apply(logits, batch)

        return steps.Step(step.rows, apply)

    monkeypatch.setattr("tabstop.sampling.sampler.STEPS", [counting(step) for step in steps.STEPS])
    plain = [Sampling(temperature=t, seed=3, num_logprobs=n) for t, n in ((0.0, None), (1.0, None), (0.5, 2))]
    sampler, rows = after_history([*plain, *NEW_STEPS]), np.arange(len(plain) + len(NEW_STEPS))
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(2))
    assert sampler.takes_logits_as_they_are(rows[:3], np.full(3, NEXT))
    monkeypatch.setattr(torch.Tensor, "clone", None)
    sampler.sample(logits[:3], rows[:3], np.full(3, NEXT), None)
    monkeypatch.undo()
    assert seen == {}
    monkeypatch.setattr("tabstop.sampling.sampler.STEPS", [counting(step) for step in steps.STEPS])
    for row in rows[3:]:
        assert not sampler.takes_logits_as_they_are(rows[[0, row]], np.full(2, NEXT))
    sampler.sample(logits, rows, np.full(len(rows), NEXT), None)
    assert seen == {
        "apply_allowed": 1,
        "apply_banned_runs": 1,
        "apply_bias": 2,
        "apply_penalties": 6,
        "apply_min_p": 2,
        "apply_top_k_top_p": 1,
        "apply_typical_p": 2,
    }


def test_logprobs_are_the_models_own():
    """Against float64, of the distribution before biases, penalties and temperature."""
    wanted = [None, 0, 3, 20]
    samplings = [Sampling(temperature=0.3, seed=5, num_logprobs=n, logit_bias=((4, 50.0),)) for n in wanted]
    sampler, rows = after_history(samplings), np.arange(4)
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(3))
    places = np.array([0, 2, 3, 5])
    tokens = torch.zeros(6, dtype=torch.int64)
    tokens[places] = sampler.sample(logits[places], rows, np.full(4, NEXT), None)
    reported = sampler.report(logits, tokens, rows, places)
    found = reported.entries()
    assert list(found) == [1, 2, 3] and sampler.report(logits, tokens, rows[:1], places[:1]) is None
    for row, (entry,) in found.items():
        exact = logits[places[row]].double().log_softmax(-1).numpy()
        order = np.argsort(-exact, kind="stable")
        assert entry.logprob == pytest.approx(exact[4], abs=1e-6)
        assert entry.rank == 1 + order.tolist().index(4)
        assert entry.top_ids == order[: wanted[row]].tolist()
        assert entry.top_logprobs == pytest.approx(exact[order[: wanted[row]]].tolist(), abs=1e-6)


def test_greedy_is_exact_beside_random_rows():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(temperature=t, seed=3, top_k=k) for t, k in [(0, 0), (1, 5), (0, 3), (0.5, 0), (0, 0), (2, 0)]
    ]
    drawn = sample_rows(logits, samplings, np.arange(6))
    for row in (0, 2, 4):
        assert drawn[row] == logits[row].argmax()


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1))
    samplings = [Sampling(temperature=1, seed=n, top_k=n % 3 * 4, top_p=1 - n / 20) for n in range(8)]
    together = sample_rows(logits, samplings, np.arange(8))
    for row in range(8):
        alone = sample_rows(logits[row : row + 1], samplings[row : row + 1], np.arange(row, row + 1))
        assert alone[0] == together[row]


def test_a_draw_depends_on_seed_candidate_and_position():
    base = (3, 1, 10)
    numbers = {
        tuple(c): uniform(*(np.array([x], np.uint64) for x in c))[0] for c in [base, (4, 1, 10), (3, 2, 10), (3, 1, 11)]
    }
    assert len(set(numbers.values())) == 4
    many = uniform(np.full(100_000, 7, np.uint64), np.zeros(100_000, np.uint64), np.arange(100_000, dtype=np.uint64))
    assert abs(many.mean() - 0.5) < 0.005 and abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("vocab", [31, 64, 1000])
def test_forbid_numpy_equals_forbid_torch(vocab):
    rng = np.random.default_rng(vocab)
    masks = rng.integers(-(2**31), 2**31, (5, -(-vocab // 32)), dtype=np.int64).astype(np.int32)
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1))
    wanted = steps.forbid_torch(logits, masks)
    assert torch.isinf(wanted).any() and torch.equal(steps.forbid_numpy(logits, masks), wanted)


def test_masks_forbid_tokens_of_their_row_only():
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 10
    masks = np.full((2, 2), -1, np.int32)
    masks[0] = [1 << 9, 0]
    drawn = sample_rows(logits, [Sampling(temperature=1, seed=1)] * 2, np.zeros(2, np.int64), masks)
    assert drawn.tolist() == [9, 7]


def test_the_largest_random_number_stays_inside_the_allowed_tokens(monkeypatch):
    """Rounding at the end of the cumulative sum must not draw a forbidden last token."""
    monkeypatch.setattr("tabstop.sampling.sampler.uniform", lambda *_: np.array([1 - 2**-53]))
    logits = torch.zeros(1, VOCAB)
    logits[0, 30:] = -torch.inf
    assert sample_rows(logits, [Sampling(temperature=1)], np.zeros(1, np.int64))[0] == 29


def test_a_row_without_a_distribution_still_draws_from_the_vocabulary():
    """What overflowed, or a mask that allows nothing: the token is fed to the model, so it must be one."""
    logits = torch.zeros(3, VOCAB)
    logits[0], logits[1] = torch.nan, -torch.inf
    logits[2, 5] = 100
    drawn = sample_rows(logits, [Sampling(temperature=1, seed=1)] * 3, np.zeros(3, np.int64))
    assert drawn.min() >= 0 and drawn.max() < VOCAB and drawn[2] == 5
