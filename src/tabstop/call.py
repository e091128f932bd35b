"""A request and its answer in the words that all dialects share: plain data between api/ and the service.

Filled by a dialect (api/dialects/<dialect>.py), read by the service. Nothing here is HTTP, JSON or tokens of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tabstop.text.chat import Conversation
from tabstop.text.fim import FillReport, Hole
from tabstop.text.reporting import ReportedPrompt, ReportedToken
from tabstop.tools import CallPiece, ToolUse
from tabstop.types import ConstraintSpec, FinishReason, Priority, RequestId


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A raw prompt: control tokens that it spells count as such."""

    text: str
    bos: bool = True  # opened as the model expects it


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt as ids, taken as it is."""

    ids: list[int]


Prompt = TextPrompt | TokenPrompt | Conversation | Hole


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of a client. None means: not given; the service or the checkpoint decides."""

    prompts: tuple[Prompt, ...]
    model: str = ""  # "" is the first model
    request_id: str = ""  # for logs
    tenant: str = ""  # from the key
    spend_tokens: Callable[[int], None] | None = (
        None  # told of every token of the prompts and of the answer as it comes
    )

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    penalty_window: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()  # no run of tokens that spells one of them
    banned_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # likeliest tokens beside each token's own log-probability; None: nothing of them
    num_prompt_logprobs: int | None = (
        None  # the same of the prompt; with `echo` and num_logprobs its text has them, too
    )
    num_samples: int = 1
    num_best: int | None = None  # of a whole answer's samples of each prompt only so many, the likeliest (best_choices)

    max_tokens: int | None = None  # given: must fit into the context
    default_max_tokens: int | None = None  # where max_tokens is not given; cut to what fits; None: all that fits
    min_tokens: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    keep_stop_string: bool = False  # leave it, or a stop token, at the end of the text
    show_control: bool = False  # control tokens, by their names
    constraints: tuple[ConstraintSpec, ...] = ()  # what the text may be (grammar/specs.py)
    constraint_param: str | None = None  # the parameter that asked for it
    tools: ToolUse | None = None  # the answer may call them; what the model is told of them is the conversation's
    truncate_prompt: int | None = None  # to so many last tokens; 0: to what fits
    echo: bool = False  # the prompt's text comes first
    reasoning: Literal["apart", "hidden", "inline"] = "inline"  # where a chat's thoughts go
    min_indent: int = 0  # a later line that is indented less ends the text
    max_seconds: float | None = None  # from the first token; ends the text once it has a line end
    healing: bool | None = None  # of the token that the cursor is in
    confidence: bool = False  # say how likely each choice's tokens were
    min_confidence: float | None = None  # a whole choice of a lower mean has no text. unit: nats
    distinct: bool = False  # of a whole answer's choices, only those that differ by more than blanks

    client: str = ""  # the program that asks, by its user agent
    priority: Priority = Priority.NORMAL
    deadline_ms: int | None = None  # from now
    session: str = ""
    adapter: str = ""
    cache_salt: str = ""  # parts the prefix cache further than tenant, model and adapter do
    cache_read: bool = True
    cache_write: bool = True
    cache_retain: bool = True

    @property
    def num_reported(self) -> int | None:
        """As num_logprobs, of what the engine is asked: ranking and confidence need them, too."""
        is_needed = self.num_best is not None or self.confidence
        return 0 if self.num_logprobs is None and is_needed else self.num_logprobs

    @property
    def num_prompt_reported(self) -> int | None:
        """As num_prompt_logprobs, of what the engine is asked."""
        counts = [n for n in (self.num_prompt_logprobs, self.num_logprobs if self.echo else None) if n is not None]
        return max(counts, default=None)


@dataclass(slots=True)
class Confidence:
    """How likely the model found a choice's tokens, an end token included. unit: nats (log-probabilities)"""

    num_tokens: int = 0
    total: float = 0.0
    minimum: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.num_tokens)

    def add(self, tokens: Sequence[ReportedToken]) -> None:
        """The next tokens."""
        for token in tokens:
            self.num_tokens += 1
            self.total += token.chosen.logprob
            self.minimum = min(self.minimum, token.chosen.logprob)


@dataclass(slots=True)
class TextDelta:
    """New text of one choice. A choice is one sample of one prompt: index = prompt × num_samples + sample."""

    index: int
    text: str
    token_ids: list[int]  # those kept, the end token included
    finish: FinishReason | None = None  # set once for each choice
    stop_reason: str | int | None = None  # the stop string, or which of the call's stop_token_ids
    fill: FillReport | None = None  # of a hole, beside `finish`
    logprobs: list[ReportedToken] = field(default_factory=list)  # one for each of token_ids, if they were asked for
    prompt: ReportedPrompt | None = None  # beside a choice's first text, if it was asked for
    calls: list[CallPiece] = field(default_factory=list)  # of tools, new beside the text
    has_calls: bool = False  # beside `finish`: the choice calls tools
    confidence: Confidence | None = None  # of the whole choice, beside `finish`, if it was asked for
    reasoning: str = ""  # comes before `text`, also where a delta has both

    def append(self, later: TextDelta) -> None:
        """Takes over a later delta of the same choice."""
        self.text += later.text
        self.reasoning += later.reasoning
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.prompt = self.prompt or later.prompt
        self.calls += later.calls
        self.has_calls = later.has_calls
        self.finish, self.stop_reason, self.fill = later.finish, later.stop_reason, later.fill
        self.confidence = later.confidence


def up_to_end(deltas: Iterable[TextDelta]) -> TextDelta:
    """One of several of a choice, at least one, up to the first that ends it; no more are asked for."""
    rest = iter(deltas)
    whole = next(rest)
    while whole.finish is None and (later := next(rest, None)) is not None:
        whole.append(later)
    return whole


def best_choices(choices: Sequence[TextDelta], call: Call) -> list[TextDelta]:
    """Of each prompt's whole choices, which come in order, the `num_best` of the highest mean log-probability a token.

    They are numbered anew, best first.
    """
    if call.num_best is None:
        return list(choices)
    kept: list[TextDelta] = []
    for first in range(0, len(choices), call.num_samples):
        kept += sorted(choices[first : first + call.num_samples], key=_mean_logprob, reverse=True)[: call.num_best]
    for index, choice in enumerate(kept):
        choice.index = index
        choice.logprobs = [] if call.num_logprobs is None else choice.logprobs
    return kept


def _mean_logprob(choice: TextDelta) -> float:
    return sum(token.chosen.logprob for token in choice.logprobs) / max(1, len(choice.logprobs))


@dataclass(slots=True)
class Usage:
    """Counts of a whole answer."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt tokens, found in the prefix cache
    num_completion_tokens: int = 0
    num_reasoning_tokens: int = 0  # of them; counted where reasoning is told apart
    prompt_seconds: float = 0.0  # from the call to its first token
    seconds: float = 0.0  # from the call to its last end


@dataclass(slots=True)
class Summary:
    """What remains of an answer when it is over: for metrics and the log. No text."""

    model: str
    request_id: str
    usage: Usage
    outcome: str = "cancelled"  # ok, cancelled, or an error's code
    client: str = ""  # as in Call
    fills: list[FillReport] = field(default_factory=list)  # one for each prompt that was a hole
    num_healed_tokens: int = 0  # taken back from the ends of prompts
    num_overlaps: int = 0  # samples cut where they repeated the suffix
    finishes: list[FinishReason] = field(default_factory=list)
    engine_ids: list[RequestId] = field(default_factory=list)  # by which the engine knew its prompts
    seconds: float = 0.0
    first_token_seconds: float | None = None
