"""How many prompt tokens a step takes beside its decoding rows. Pure numbers; knows no request, block or clock.

Decoding reads all weights for few tokens, prompts compute much on the weights they read: in one step the second come
almost for nothing, up to the card's ridge (some 260 tokens on a Hopper card). So when more requests want memory than
fit, prompts are best consumed as fast as rows end, in equal steps: chunk = rows · mean prompt / mean output. When all
fit, whoever waits should start soon, but a lone long prompt must not make every stream wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_CHUNK = 64
"""Tokens: below it a prompt's chunk costs more attention and launches than it hides."""

RIDGE = 256
"""Tokens that a Hopper card computes while it reads the weights, whatever the model's size. While the backlog is small,
a step has twice as many, or twice its decoding rows: it takes two to three times as long as one without a prompt."""

BURST_STEPS = 16
"""A backlog of more full steps than that is a burst: then the rate counts, not the gap between two tokens."""

TILE = 32
"""Steps of a saturated engine have multiples of that many tokens, as matrix units like them."""

UNKNOWN_OUTPUT = 256
"""Tokens that an answer is expected to have at most, until answers have been seen."""

ENOUGH_ANSWERS = 16
MEMORY = 256
"""Values that a running mean remembers."""


class RunningMean:
    """Of all values at first, of about the last MEMORY later on."""

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, MEMORY)


@dataclass(frozen=True, slots=True)
class Load:
    """What a step finds."""

    num_decoding: int  # rows of one token
    num_requests: int  # samples that run or wait
    num_backlog: int  # prompt tokens of the running ones that are not computed
    num_waiting: int  # samples that wait


class Mix:
    """Learns the lengths of prompts and answers, and says how a step is mixed."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, num_pool_tokens: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._num_pool_tokens = num_pool_tokens
        self._prompt, self._limit, self._answer = RunningMean(), RunningMean(), RunningMean()

    def see_request(self, num_prompt_tokens: int, max_tokens: int) -> None:
        self._prompt.add(num_prompt_tokens)
        self._limit.add(min(max_tokens, UNKNOWN_OUTPUT))

    def see_answer(self, num_tokens: int) -> None:
        """One that ended by itself."""
        self._answer.add(num_tokens)

    @property
    def mean_answer(self) -> float:
        return max(1.0, (self._answer if self._answer.count >= ENOUGH_ANSWERS else self._limit).value)

    @property
    def num_resident(self) -> int:
        """Samples of the usual size that slots and pool hold; on average they are half done."""
        mean_size = max(1.0, self._prompt.value + self.mean_answer / 2)
        return max(1, min(self._max_num_seqs, int(self._num_pool_tokens / mean_size)))

    def prompt_budget(self, load: Load) -> int:
        """Most prompt tokens of the next step; what the rows of one token leave of the step's budget bounds it, too."""
        if not load.num_decoding:
            return self._budget
        num_resident = self.num_resident
        if load.num_requests > num_resident:
            chunk = max(MIN_CHUNK, round(num_resident * self._prompt.value / self.mean_answer))
            return max(MIN_CHUNK, round((load.num_decoding + chunk) / TILE) * TILE - load.num_decoding)
        num_backlog = load.num_backlog + load.num_waiting * self._prompt.value
        if num_backlog > BURST_STEPS * self._budget:
            return self._budget
        return 2 * max(RIDGE, load.num_decoding) - load.num_decoding
