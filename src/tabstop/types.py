"""What crosses a process border: plain data in msgspec structs, and nothing else.

Knows no torch, no HTTP and no text. Prompt ids travel as little-endian uint32 bytes. Times are remaining milliseconds,
never clock readings, because the two ends of a socket do not share a clock.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

RequestId = tuple[int, int]
"""(front end number, counter within that front end): unique within one server's life without asking anybody."""


MAX_LOGPROBS = 20
"""Likeliest tokens reported beside a drawn one, at most."""


class Priority(enum.IntEnum):
    """Scheduling class; lower runs first."""

    INTERACTIVE = 0
    NORMAL = 1
    BACKGROUND = 2


class FinishReason(enum.StrEnum):
    """Why a sample ended. Every sample ends with exactly one; each dialect maps them onto its own list."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    SUPERSEDED = "superseded"
    ERROR = "error"


class Stage(enum.StrEnum):
    """Where a request is in its life; also the label of the abort counter."""

    COMPILING = "compiling"  # its constraints are being compiled off the loop
    WAITING = "waiting"  # in the queue, owns nothing
    PROMPT = "prompt"  # running, prompt not yet computed whole
    DECODING = "decoding"
    FINISHED = "finished"


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are drawn. A draw's random number depends on (seed, candidate, position) alone."""

    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0 means all
    top_p: float = 1.0  # 1 means all
    seed: int = 0  # the service fills a random one when the client gave none
    min_p: float = 0.0  # of the likeliest token's probability; 0 means all
    typical_p: float = 1.0  # 1 means all
    repetition_penalty: float = 1.0  # divides what the prompt or the output has; 1 means none
    presence_penalty: float = 0.0  # subtracted once from what the output has
    frequency_penalty: float = 0.0  # subtracted for each time that the output has it
    penalty_window: int = 0  # over 0: all penalties look at so many last tokens, be they prompt or output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    banned: tuple[tuple[int, ...], ...] = ()  # runs of ids that the output never has
    num_logprobs: int | None = None  # that many likeliest tokens are reported beside each drawn one; None: nothing is
    num_prompt_logprobs: int | None = None  # the same of the prompt's tokens; such a request reads no cached blocks

    @property
    def looks_back(self) -> bool:
        """Whether a draw needs the tokens before it."""
        has_penalty = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(has_penalty) or any(len(run) > 1 for run in self.banned)


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """When a sample ends, as far as token ids and time decide it."""

    max_tokens: int
    min_tokens: int = 0  # that many tokens come before a stop token may end a sample
    stop_sets: tuple[str, ...] = ("eos",)  # names of the stop sets given to the engine at start-up
    stop_token_ids: tuple[int, ...] = ()  # the request's own, beside the sets
    deadline_ms: int | None = None  # remaining when sent
    queue_ms: int | None = None  # within that many a first token must have been begun, or it is refused as overload


class CachePolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the prefix cache may do for a request."""

    scope: str = ""  # tenant, model and adapter: blocks are never shared between scopes
    read: bool = True
    write: bool = True
    retain: bool = True  # False: its freed blocks are the first to be evicted


class ConstraintSpec(msgspec.Struct, frozen=True):
    """A constraint by registry name (grammar/) and its JSON-able argument."""

    kind: str
    value: Any = None


class Submit(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """One request: a prompt and how many samples of its continuation."""

    request_id: RequestId
    prompt_ids: bytes  # see pack_ids
    sampling: Sampling
    limits: Limits
    num_samples: int = 1
    cache: CachePolicy = CachePolicy()
    constraints: tuple[ConstraintSpec, ...] = ()
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    session: str = ""
    adapter: str = ""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request's unfinished samples (all of them, or those named) with `reason`. Unknown ids are ignored."""

    request_id: RequestId
    samples: tuple[int, ...] | None = None
    reason: FinishReason = FinishReason.ABORT


class EngineFailure(msgspec.Struct, frozen=True):
    """Why the engine ended a sample with ERROR. `code` is an errors.TabstopError's `code`."""

    code: str
    message: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """What the model itself thought of a token, drawn or of the prompt: at temperature 1, before masks, biases and
    penalties.
    """

    logprob: float
    rank: int  # 1: the likeliest
    top_ids: list[int]  # the likeliest tokens, likeliest first
    top_logprobs: list[float]  # theirs


class Delta(msgspec.Struct, tag=False, omit_defaults=True):
    """New tokens of one sample. Each of a request's `num_samples` samples gets exactly one Delta with `finish` set."""

    request_id: RequestId
    sample: int
    token_ids: list[int]  # includes the token that ended the sample
    finish: FinishReason | None = None
    stop_token_id: int | None = None  # the last of token_ids, when it ended the sample: not part of its text
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; on every Delta of the request
    failure: EngineFailure | None = None
    logprobs: list[TokenLogprobs] = []  # one for each of token_ids, if they were asked for
    prompt_logprobs: list[TokenLogprobs] = []
    """Of the prompt's next tokens, from its second on; of the first nothing is known. In a request's Deltas each comes
    once, in order, before any sample's first token, with whichever sample computed it."""


def single_tokens(delta: Delta) -> Iterator[Delta]:
    """The delta as one for each of its tokens, the end beside the last; one without tokens as it is."""
    last = len(delta.token_ids) - 1
    if last < 1:
        yield delta
        return
    begun = msgspec.structs.replace(delta, finish=None, stop_token_id=None, prompt_logprobs=[])
    for at in range(last + 1):
        shown = delta if at == last else begun
        yield msgspec.structs.replace(
            shown, token_ids=delta.token_ids[at : at + 1], logprobs=delta.logprobs[at : at + 1]
        )


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """All deltas of one step for one front end."""

    deltas: list[Delta]


class Command(msgspec.Struct, frozen=True, tag=True):
    """Control request; `name` is looked up in the engine's command registry (engine/commands.py)."""

    command_id: int
    name: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True, tag=True):
    command_id: int
    result: Any = None
    failure: EngineFailure | None = None


class Ledger(msgspec.Struct, frozen=True):
    """Where every token slot of the KV pool is. The parts add up to `total`; the scheduler checks it.

    used: slots that hold a token of a live request (shared blocks count once) · waste: the unfilled rest of those
    blocks · reserved: blocks held but not owned by a request (sources of copies in flight) · cached: blocks that nobody
    owns but the prefix index still finds · free: the rest.
    """

    total: int = 0
    used: int = 0
    waste: int = 0
    reserved: int = 0
    cached: int = 0
    free: int = 0


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The engine's state, sent at most ten times a second, also when idle: it is the heartbeat."""

    num_steps: int = 0
    num_waiting: int = 0  # samples; of a request whose prompt is not computed, the first
    num_running: int = 0  # samples, each in a slot
    num_requests: int = 0  # that have not ended
    num_requests_running: int = 0  # of them, with a sample that runs
    ledger: Ledger = Ledger()
    num_prompt_tokens: int = 0  # totals since start
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_overrun_tokens: int = 0  # sampled for samples that had already ended
    aborts: dict[str, int] = {}  # by Stage
    finished: dict[str, int] = {}  # by FinishReason


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """What the engine tells once it can serve; the front end rejects bad requests by it."""

    model: str
    architecture: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    device: str = "cpu"
    dtype: str = "float32"
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    kernels: dict[str, str] = {}  # concept → what was chosen, e.g. {"attention": "reference"}
    load_seconds: float = 0.0
    load_stages: dict[str, float] = {}  # of these, seconds by stage; stages that took no time to speak of are left out
    max_num_waiting: int = 1024  # prompts that the queue holds
    memory: dict[str, int] = {}  # of a GPU, bytes by part; "driver" is what it counts in all (worker/memory.py)


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up progress of the engine: `done` of `total` bytes (or steps) of `stage`."""

    stage: str
    done: int
    total: int


ToEngine = Submit | Abort | Command
FromEngine = Outputs | Reply | Stats | EngineInfo | Progress


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids → little-endian uint32 bytes."""
    packed = array("I", ids)
    assert packed.itemsize == 4
    return packed.tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """Inverse of pack_ids."""
    return array("I", packed).tolist()
