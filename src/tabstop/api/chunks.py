"""Deltas → OpenAI's chunks and whole answers: the shape that most dialects answer in."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Self

import msgspec

from tabstop.api.errors import error_object
from tabstop.api.holes import confidence_object, fill_object
from tabstop.api.logprobs import NO_PROMPTS, PromptShown, chat_logprobs, prompt_logprobs
from tabstop.api.schema import Generation
from tabstop.api.tools import new_calls, whole_calls
from tabstop.call import Call, TextDelta, Usage
from tabstop.errors import TabstopError
from tabstop.service import ServedModel
from tabstop.text.fim import FillReport
from tabstop.text.reporting import ReportedToken
from tabstop.types import FinishReason

FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.DEADLINE: "length",
    FinishReason.SUPERSEDED: "stop",
}
"""ABORT and ERROR never get here: they end the answer with an error."""


class ChunkFormat:
    """What chunks and whole answers of all kinds share."""

    media_type = "text/event-stream"
    id_prefix = ""
    chunk_object = ""
    whole_object = ""

    def __init__(self, model: str, num_choices: int, include_usage: bool, shown: PromptShown = NO_PROMPTS) -> None:
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._shown = shown
        self._base = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    @classmethod
    def of(cls, body: Generation, call: Call, model: ServedModel, name: str) -> Self:
        """For endpoints.Generating."""
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        shown = PromptShown(call.num_logprobs if call.echo else None, call.num_prompt_logprobs)
        return cls(name, len(call.prompts) * call.num_samples, wants_usage, shown)

    def opening(self) -> bytes:
        return b""

    def closing(self, usage: Usage) -> bytes:
        counts = self._event([], usage=usage_object(usage)) if self._include_usage else b""
        return counts + b"data: [DONE]\n\n"

    def failure(self, error: TabstopError) -> bytes:
        return event(error_object(error)) + b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        return event({**self._base, "object": self.chunk_object, "choices": choices, **extra})

    def _listed(self, choice: TextDelta) -> dict[str, Any]:
        """vLLM's prompt_logprobs, where they were asked for."""
        count, prompt = self._shown.listed, choice.prompt
        if count is None:
            return {}
        return {"prompt_logprobs": None if prompt is None else prompt_logprobs(prompt, count)}

    def _whole(
        self, choices: list[dict[str, Any]], usage: Usage, fill: FillReport | None = None, **extra: Any
    ) -> bytes:
        answer = {**self._base, "object": self.whole_object, "choices": choices, "usage": usage_object(usage)}
        return msgspec.json.encode(answer | fill_object(fill) | extra)


class ChatFormat(ChunkFormat):
    """Chats, and holes that are answered like them."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    no_text: Mapping[str, str] = {"content": ""}
    """What a chunk says that has log-probabilities and no text."""

    def opening(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._event([_chat_choice(index, "delta", role)]) for index in range(self._num_choices))

    def delta(self, delta: TextDelta) -> bytes:
        content, logprobs = b"", delta.logprobs
        if delta.reasoning:
            shown: dict[str, Any] = {"reasoning_content": delta.reasoning}
            content = self._event([_chat_choice(delta.index, "delta", shown, logprobs=logprobs)])
            logprobs = []
        calls = new_calls(delta.calls)
        if delta.text or logprobs or calls:
            shown = {"content": delta.text} if delta.text else {} if calls else {**self.no_text}
            shown |= {"tool_calls": calls} if calls else {}
            content += self._event([_chat_choice(delta.index, "delta", shown, logprobs=logprobs)])
        if not delta.finish:
            return content
        return content + self._event([_chat_choice(delta.index, "delta", {}, delta)], **fill_object(delta.fill))

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        shown = [_chat_choice(c.index, "message", _message(c), c, logprobs=c.logprobs) for c in choices]
        return self._whole(shown, usage, choices[0].fill, **self._listed(choices[0]))


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage, always with the cached tokens."""
    counts: dict[str, Any] = {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }
    if usage.num_reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": usage.num_reasoning_tokens}
    return counts


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def finish_fields(delta: TextDelta | None) -> dict[str, Any]:
    """How a choice ended, if it has."""
    if delta is None or delta.finish is None:
        return {"finish_reason": None}
    calls = delta.has_calls and delta.finish is FinishReason.STOP
    finish: dict[str, Any] = {"finish_reason": "tool_calls" if calls else FINISH_REASONS[delta.finish]}
    finish |= {} if delta.stop_reason is None else {"stop_reason": delta.stop_reason}
    return finish | confidence_object(delta.confidence)


def _message(choice: TextDelta) -> dict[str, Any]:
    """A whole one; without content where there are but calls."""
    calls = whole_calls(choice.calls)
    shown: dict[str, Any] = {"role": "assistant"}
    shown |= {"reasoning_content": choice.reasoning} if choice.reasoning else {}
    shown |= {"content": choice.text or (None if calls else "")}
    return shown | ({"tool_calls": calls} if calls else {})


def _chat_choice(
    index: int,
    key: str,
    content: dict[str, Any],
    ended: TextDelta | None = None,
    *,
    logprobs: Sequence[ReportedToken] = (),
) -> dict[str, Any]:
    return {"index": index, key: content, "logprobs": chat_logprobs(logprobs), **finish_fields(ended)}
