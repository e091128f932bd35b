"""Sessions whose prompt grows: chat turns and coding-agent turns.

The agent model follows published measurements of such sessions: tools and system text common to all, a repository part
common to a group (Zipf), a session part, some thousand new tokens a turn, most turns started by a tool after seconds,
some by a human after tens of seconds. All lengths scale with `prefix_tokens` (32,000 is life size).
"""

from __future__ import annotations

import numpy as np

from tabstop.bench.records import Message, Session, Turn
from tabstop.bench.workloads import WorkloadSpec
from tabstop.bench.workloads.lengths import draw_lengths
from tabstop.bench.workloads.prompts import Piece, PromptMaker, join, message_of, turn_of

AGENT_SYSTEM, AGENT_REPOSITORY, AGENT_SESSION, AGENT_STEP, AGENT_ANSWER = 32_000, 20_000, 15_000, 6_000, 1_000
TOOL_DELAY, HUMAN_DELAY, TOOL_SHARE = 2.5, 40.0, 0.7  # seconds, seconds, share of turns


def chat(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """`num_turns` questions to one growing list of messages; scripted answers, so that all endpoints do equal work."""
    shape, content = spec.shape_rng(), spec.content_rng()
    system = message_of("system", maker.make(spec.prefix_tokens, content)) if spec.prefix_tokens else None
    sessions = []
    for index in range(spec.num_requests):
        messages = [system] if system else []
        turns: list[Turn] = []
        for number, length in enumerate(draw_lengths(spec.input_tokens, spec.num_turns, shape)):
            (num_out,) = draw_lengths(spec.output_tokens, 1, shape)
            messages.append(message_of("user", maker.make(length, content)))
            turns.append(_chat_turn(spec, list(messages), num_out, _think(spec, shape) if number else 0.0))
            messages.append(_answer(spec, maker, num_out, content))
        sessions.append(Session(index=index, turns=turns))
    return sessions


def _chat_turn(spec: WorkloadSpec, messages: list[Message], num_out: int, delay: float) -> Turn:
    is_live = spec.live_answers and any(message.role == "assistant" for message in messages)
    return Turn(
        messages=messages[-1:] if is_live else messages,
        max_tokens=num_out,
        ignore_end=spec.ignore_end,
        kind="chat",
        delay=delay,
        carries_answer=is_live,
    )


def _answer(spec: WorkloadSpec, maker: PromptMaker, num_out: int, content: np.random.Generator) -> Message:
    return Message("assistant", "") if spec.live_answers else message_of("assistant", maker.make(num_out, content))


def _think(spec: WorkloadSpec, rng: np.random.Generator) -> float:
    return float(rng.exponential(spec.think_time))


def agent(spec: WorkloadSpec, maker: PromptMaker) -> list[Session]:
    """Tool-calling sessions: long common starts, short answers, the prompt growing by a step each turn."""
    shape, content = spec.shape_rng(), spec.content_rng()
    scale = spec.prefix_tokens / AGENT_SYSTEM

    def piece(num_tokens: int) -> Piece:
        return maker.make(max(1, round(num_tokens * scale)), content)

    system = piece(AGENT_SYSTEM)
    repositories = [piece(AGENT_REPOSITORY) for _ in range(spec.num_prefixes)]
    weights = np.array([1 / (rank + 1) ** 1.2 for rank in range(spec.num_prefixes)])
    sessions = []
    for index in range(spec.num_requests):
        repository = repositories[int(shape.choice(spec.num_prefixes, p=weights / weights.sum()))]
        prompt = join(system, repository, piece(AGENT_SESSION))
        turns: list[Turn] = []
        for number in range(spec.num_turns):
            num_out = max(1, round(AGENT_ANSWER * scale))
            turns.append(
                turn_of(
                    prompt,
                    maker,
                    max_tokens=num_out,
                    ignore_end=spec.ignore_end,
                    kind="agent",
                    delay=_agent_delay(spec, shape) if number else 0.0,
                )
            )
            prompt = join(prompt, piece(AGENT_ANSWER), piece(AGENT_STEP))
        sessions.append(Session(index=index, turns=turns))
    return sessions


def _agent_delay(spec: WorkloadSpec, rng: np.random.Generator) -> float:
    """Exponential around 2.5 s after a tool, 40 s after a human; `think_time` scales both (1 is life size)."""
    mean = TOOL_DELAY if rng.random() < TOOL_SHARE else HUMAN_DELAY
    return float(rng.exponential(mean * spec.think_time))
