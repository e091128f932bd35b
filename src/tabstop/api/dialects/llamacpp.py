"""llama.cpp's dialect, as its editors speak it: /infill, /completion, /props, /slots, /apply-template.

/completions stays OpenAI's. Samplers that this server does not have are ignored when `samplers` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from tabstop.api import Route
from tabstop.api.chunks import event
from tabstop.api.endpoints import Generating, json_response, of_model
from tabstop.api.errors import error_object
from tabstop.api.fields import Caller, conversation, prompts_of, shared_fields
from tabstop.api.holes import confidence_object, fill_object, hole_fields, surroundings
from tabstop.api.logprobs import chat_entry
from tabstop.api.sampling import refuse_prompt_logprobs
from tabstop.api.schema import AroundHole, Count, FileBody, Name, NumLogprobs, Prompts, Repetition
from tabstop.call import Call, TextDelta, Usage
from tabstop.errors import InputError, NotSupportedError, TabstopError
from tabstop.keys import ADMIN
from tabstop.service import ServedModel, Service
from tabstop.text.fim import Hole
from tabstop.text.messages import Messages
from tabstop.text.reporting import Likelihood
from tabstop.types import FinishReason

DEFAULT_REPEAT_LAST_N = 64
EVERYTHING = 2**31 - 1


# ---- bodies


class LlamaBody(AroundHole, kw_only=True):
    """What /infill and /completion share."""

    n_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    n_indent: Count | None = None
    n_cmpl: Annotated[int, Meta(ge=1, le=1024)] | None = None
    repeat_penalty: Repetition | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    n_probs: NumLogprobs | None = None
    t_max_predict_ms: Annotated[float, Meta(ge=0)] | None = None
    response_fields: list[Name] | None = None
    return_tokens: bool | None = None
    id_slot: int | None = None


class InfillBody(LlamaBody, kw_only=True):
    """POST /infill."""

    input_prefix: str | None = None
    input_suffix: str | None = None
    input_extra: Annotated[list[FileBody], Meta(max_length=1024)] | None = None
    prompt: str | None = None


class LlamaCompletionBody(LlamaBody, kw_only=True):
    """POST /completion."""

    prompt: Prompts | None = None


class TemplateBody(msgspec.Struct, kw_only=True):
    """POST /apply-template."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    model: Name | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | None = None
    chat_template_kwargs: Any = None
    reasoning_effort: Name | None = None


# ---- body → Call


def infill_call(body: InfillBody, caller: Caller) -> Call:
    """Raises InputError or NotSupportedError, naming the parameter."""
    around = surroundings(body, body.input_extra or ())
    prefix, suffix, ahead = (text or "" for text in (body.input_prefix, body.input_suffix, body.prompt))
    hole = Hole(prefix, suffix, around, body.fim_order or "", ahead=ahead)
    return Call(prompts=(hole,), **_generation(body, caller))


def llama_completion_call(body: LlamaCompletionBody, caller: Caller) -> Call:
    """Raises InputError or NotSupportedError, naming the parameter."""
    prompts = prompts_of(body.prompt, True)
    if len(prompts) != 1:
        raise InputError("send one prompt at a time", param="prompt")
    return Call(prompts=tuple(prompts), **_generation(body, caller))


def _generation(body: LlamaBody, caller: Caller) -> dict[str, Any]:
    if body.n_cmpl and body.stream:
        raise InputError("n_cmpl needs the whole answer; leave stream out", param="n_cmpl")
    if body.n_cmpl and body.best_of:
        raise InputError("n_cmpl shows all of its samples; leave best_of out", param="best_of")
    if body.logprobs or body.top_logprobs:
        raise NotSupportedError("`logprobs` is called `n_probs` here", param="logprobs")
    refuse_prompt_logprobs(body)
    fields = shared_fields(body, caller) | _penalties(body) | hole_fields(body)
    if body.seed is not None and body.seed < 0:
        fields["seed"] = None
    limit = body.n_predict if body.n_predict is not None else body.max_tokens
    return fields | {
        "num_samples": body.n_cmpl or fields["num_samples"],
        "distinct": bool(body.n_cmpl or body.distinct),
        "max_tokens": None if limit is None or limit < 0 else limit,
        "min_indent": body.n_indent or 0,
        "max_seconds": body.t_max_predict_ms / 1000 if body.t_max_predict_ms else None,
        "num_logprobs": body.n_probs or None,
    }


def _penalties(body: LlamaBody) -> dict[str, Any]:
    """Here all of them look at the last 64 tokens, prompt or output, where the client names no other number."""
    last = DEFAULT_REPEAT_LAST_N if body.repeat_last_n is None else body.repeat_last_n
    if not last:
        return {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    repetition = body.repeat_penalty if body.repeat_penalty is not None else body.repetition_penalty
    return {"repetition_penalty": repetition, "penalty_window": EVERYTHING if last < 0 else last}


# ---- deltas → JSON


class LlamaFormat:
    """One object, an array where several completions were asked for (n_cmpl or n), or a stream without [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, model: str, body: LlamaBody, max_model_len: int) -> None:
        self._model = model
        self._body = body
        self._max_model_len = max_model_len
        self._last: dict[int, TextDelta] = {}  # by choice, what a stream ends with

    @classmethod
    def of(cls, body: LlamaBody, call: Call, model: ServedModel, name: str) -> Self:
        """For endpoints.Generating."""
        return cls(name, body, model.max_model_len)

    def opening(self) -> bytes:
        return b""

    def delta(self, delta: TextDelta) -> bytes:
        if delta.finish is not None:
            self._last[delta.index] = delta
        shown = {"index": delta.index, "content": delta.text, "tokens": delta.token_ids, "stop": False}
        return event(shown | _probabilities(delta))

    def closing(self, usage: Usage) -> bytes:
        ends = (
            TextDelta(d.index, "", [], d.finish, d.stop_reason, d.fill, confidence=d.confidence)
            for d in self._last.values()
        )
        return b"".join(event(self._object(end, usage)) for end in ends)

    def failure(self, error: TabstopError) -> bytes:
        return event({"error": error_object(error)["error"] | {"code": error.status}})

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        objects = [_selected(self._object(choice, usage), self._body.response_fields) for choice in choices]
        return msgspec.json.encode(objects if (self._body.n_cmpl or self._body.n or 1) > 1 else objects[0])

    def _object(self, choice: TextDelta, usage: Usage) -> dict[str, Any]:
        is_word = choice.finish is FinishReason.STOP and isinstance(choice.stop_reason, str)
        stop_type = "word" if is_word else "eos" if choice.finish is FinishReason.STOP else "limit"
        return {
            "index": choice.index,
            "content": choice.text,
            "tokens": choice.token_ids if self._body.return_tokens else [],
            "id_slot": self._body.id_slot if self._body.id_slot is not None else -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": usage.num_completion_tokens,
            "tokens_evaluated": usage.num_prompt_tokens,
            "tokens_cached": usage.num_prompt_tokens + usage.num_completion_tokens,
            "generation_settings": {"n_ctx": self._max_model_len, "n_predict": self._body.n_predict or -1},
            "has_new_line": "\n" in choice.text,
            "truncated": bool(choice.fill and choice.fill.cut_tokens),
            "stop_type": stop_type,
            "stopping_word": choice.stop_reason if is_word else "",
            "timings": timings(usage),
            **_probabilities(choice),
            **_said(choice),
        }


def _said(choice: TextDelta) -> dict[str, Any]:
    """`tabstop`: of the hole and of the choice, since an object is one choice."""
    shown = fill_object(choice.fill).get("tabstop", {}) | confidence_object(choice.confidence).get("tabstop", {})
    return {"tabstop": shown} if shown else {}


def _probabilities(delta: TextDelta) -> dict[str, Any]:
    tokens = [_entry(token.chosen) | {"top_logprobs": list(map(_entry, token.top))} for token in delta.logprobs]
    return {"completion_probabilities": tokens} if tokens else {}


def _entry(entry: Likelihood) -> dict[str, Any]:
    return {"id": entry.token_id, **chat_entry(entry)}


def timings(usage: Usage) -> dict[str, float]:
    """llama.cpp's counts and times; prompt_n is what was computed, cache_n what was found."""
    prompt_n, predicted_n = usage.num_prompt_tokens - usage.num_cached_tokens, usage.num_completion_tokens
    prompt_seconds = usage.prompt_seconds if predicted_n else usage.seconds  # a warm-up is nothing but its prompt
    prompt_ms, predicted_ms = prompt_seconds * 1000, max(0.0, usage.seconds - prompt_seconds) * 1000
    return {
        "cache_n": usage.num_cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, prompt_n),
        "prompt_per_second": prompt_n * 1000 / prompt_ms if prompt_ms else 0.0,
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(1, predicted_n),
        "predicted_per_second": predicted_n * 1000 / predicted_ms if predicted_ms else 0.0,
    }


def _selected(content: dict[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    """Only those fields; `a/b` is b of a, shown under its whole name. Names of nothing are left out."""
    if names is None:
        return content
    found: dict[str, Any] = {}
    for name in names:
        value: Any = content
        for key in name.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


# ---- about the server


async def props(service: Service, request: Request, body: None) -> Response:
    """What llama.cpp's editors ask of a server."""
    model = service.models[0]
    info = model.engines[0].info
    shown = {
        "default_generation_settings": {"n_ctx": info.max_model_len, "params": {}, "is_processing": False},
        "total_slots": info.max_num_seqs,
        "model_path": model.name,
        "model_alias": model.name,
        "chat_template": model.text.template.source if model.text.template else "",
        "modalities": {"vision": False, "audio": False},
        "fim": model.text.fill.name or False,
    }
    return json_response(shown)


async def slots(service: Service, request: Request, body: None) -> Response:
    """As many as can run at once; which of them run is not said by number."""
    engine = service.models[0].engines[0]
    info, num_running = engine.info, engine.stats.num_running
    shown = [
        {"id": index, "n_ctx": info.max_model_len, "is_processing": index < num_running}
        for index in range(info.max_num_seqs)
    ]
    return json_response(shown)


def apply_template(body: TemplateBody, model: ServedModel) -> dict[str, str]:
    """Raises NotSupportedError for a model without a template, InputError when it refuses the messages."""
    if model.text.template is None:
        raise NotSupportedError("this model has no chat template", param="messages")
    return {"prompt": model.text.template.render(conversation(body))}


ROUTES = (
    Route("POST", "/infill", "Fill a hole (llama.cpp)", Generating(infill_call, LlamaFormat.of), InfillBody),
    Route(
        "POST",
        "/completion",
        "Complete a text (llama.cpp)",
        Generating(llama_completion_call, LlamaFormat.of),
        LlamaCompletionBody,
        is_versioned=False,
    ),
    Route("GET", "/props", "The server as llama.cpp describes itself", props, is_versioned=False),
    Route("GET", "/slots", "What runs, as llama.cpp says it", slots, is_versioned=False, scope=ADMIN),
    Route(
        "POST",
        "/apply-template",
        "Messages to a prompt",
        of_model(apply_template),
        TemplateBody,
        is_versioned=False,
    ),
)
