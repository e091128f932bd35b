"""OpenAI's dialect: /completions, /chat/completions and /models.

Where OpenAI's own rules are narrower than its clients' habits the wider form is taken: 64 stop strings, top_k,
stop_token_ids, min_tokens, ignore_eos (vLLM's names), an assistant message at the end that the answer continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from tabstop.api import Route
from tabstop.api.chunks import ChatFormat, ChunkFormat, finish_fields
from tabstop.api.endpoints import Generating, json_response
from tabstop.api.fields import Caller, conversation, prompts_of, refuse_unsupported, shared_fields
from tabstop.api.holes import fill_object, hole_fields, surroundings
from tabstop.api.logprobs import completion_logprobs, echoed_logprobs
from tabstop.api.sampling import chat_num_logprobs, num_prompt_logprobs
from tabstop.api.schema import AroundHole, Count, Generation, Name, Prompts, Seed, Share
from tabstop.api.tools import tool_use
from tabstop.call import Call, Prompt, TextDelta, TextPrompt, Usage
from tabstop.errors import InputError, NotSupportedError, UnknownModelError
from tabstop.service import ServedModel, Service
from tabstop.text.fim import Hole
from tabstop.text.messages import Messages
from tabstop.tools import ToolUse
from tabstop.types import ConstraintSpec

DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions when it is not given, as OpenAI documents it; chats may fill the context."""


# ---- bodies


class OllamaOptions(msgspec.Struct, kw_only=True):
    """What Ollama's clients say beside a prompt; num_predict below 0 is no limit."""

    num_predict: Annotated[int, Meta(ge=-2, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None


class CompletionBody(AroundHole, kw_only=True):
    """POST /v1/completions."""

    prompt: Prompts | None = None
    options: OllamaOptions | None = None
    suffix: str | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class ChatBody(Generation, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Any = None  # switches of text/messages.py
    reasoning_effort: Name | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None  # as llama.cpp names them
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # refused as those above
    functions: Any = None
    function_call: Any = None
    chat_template: Any = None
    documents: Any = None
    modalities: Any = None
    audio: Any = None
    echo: Any = None


# ---- body → Call


def completion_call(body: CompletionBody, caller: Caller) -> Call:
    """Raises InputError or NotSupportedError, naming the parameter."""
    if body.options is not None:
        body = _with_options(body, body.options)
    bos = body.add_special_tokens is not False
    prompts: Sequence[Prompt] = prompts_of(body.prompt, bos)
    if body.suffix or body.files:
        prompts = [_hole(prompt, body) for prompt in prompts]
    if body.distinct and len(prompts) > 1:
        raise InputError("distinct needs one prompt: whose choices are left could not be told", param="distinct")
    return Call(
        prompts=tuple(prompts),
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        echo=bool(body.echo),
        num_logprobs=_num_logprobs(body),
        num_prompt_logprobs=num_prompt_logprobs(body),
        **shared_fields(body, caller) | hole_fields(body),
    )


def _num_logprobs(body: CompletionBody) -> int | None:
    """A number; chats' spelling is told apart."""
    if body.top_logprobs is not None or body.logprobs is True:
        raise InputError("/v1/completions takes `logprobs` as a number, and no `top_logprobs`", param="logprobs")
    if body.logprobs is None or body.logprobs is False:
        return None
    if body.echo and (body.suffix or body.files):
        message = (
            "`logprobs` with `echo` is of the prompt's own tokens, and a hole is laid out in others; leave one out"
        )
        raise InputError(message, param="logprobs")
    return int(body.logprobs)


def _with_options(body: CompletionBody, options: OllamaOptions) -> CompletionBody:
    """Editors that speak Ollama's dialect to this path name their limits there; what the body itself says wins."""
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed", "stop")}
    given["max_tokens"] = options.num_predict if (options.num_predict or -1) >= 0 else None
    missing = {name: value for name, value in given.items() if value is not None and getattr(body, name) is None}
    return msgspec.structs.replace(body, **missing)


def _hole(prompt: Prompt, body: CompletionBody) -> Hole:
    if not isinstance(prompt, TextPrompt):
        raise InputError("suffix and files need prompts as text, not as token ids", param="prompt")
    return Hole(prompt.text, body.suffix or "", surroundings(body), body.fim_order or "")


def chat_call(body: ChatBody, caller: Caller) -> Call:
    """Raises InputError or NotSupportedError, naming the parameter."""
    refuse_unsupported(body, ("chat_template", "documents", "modalities", "audio", "echo"))
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    fields = shared_fields(body, caller)
    fields |= {"num_logprobs": chat_num_logprobs(body), "num_prompt_logprobs": num_prompt_logprobs(body)}
    fields |= {"tools": _tool_use(body, fields["constraints"]), "reasoning": _reasoning(body)}
    fields["constraint_param"] = fields["constraint_param"] or ("tools" if fields["tools"] else None)
    return Call(prompts=(conversation(body),), max_tokens=max_tokens, **fields)


def _tool_use(body: ChatBody, constraints: Sequence[ConstraintSpec]) -> ToolUse | None:
    for old in ("functions", "function_call"):
        if getattr(body, old) not in (None, [], "none", "auto"):
            raise NotSupportedError(f"`{old}` is the old form; use `tools` and `tool_choice` instead", param=old)
    return tool_use(body.tools, body.tool_choice, constraints, is_parallel=body.parallel_tool_calls is not False)


def _reasoning(body: ChatBody) -> Literal["apart", "hidden", "inline"]:
    """Where thoughts go, in the words of vLLM, SGLang and llama.cpp."""
    if body.separate_reasoning is False or body.reasoning_format == "none":
        return "inline"
    return "hidden" if body.include_reasoning is False else "apart"


# ---- deltas → JSON


class CompletionFormat(ChunkFormat):
    """/v1/completions."""

    id_prefix = "cmpl-"
    chunk_object = whole_object = "text_completion"

    def delta(self, delta: TextDelta) -> bytes:
        return self._event([self._choice(delta)], **fill_object(delta.fill))

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        shown = [self._choice(choice) | self._listed(choice) for choice in choices]
        return self._whole(shown, usage, choices[0].fill)

    def _choice(self, delta: TextDelta) -> dict[str, Any]:
        if self._shown.echoed is None or delta.prompt is None:
            logprobs = completion_logprobs(delta.logprobs)
        else:
            logprobs = echoed_logprobs(delta.prompt, self._shown.echoed, delta.logprobs)
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, **finish_fields(delta)}


# ---- models


async def _models(service: Service, request: Request, body: None) -> Response:
    cards = [_card(model, name) for model in service.models for name in (model.name, *model.aliases)]
    return json_response({"object": "list", "data": cards})


async def _model(service: Service, request: Request, body: None) -> Response:
    name = request.path_params["model"]
    model = service.resolve(name)
    if name not in (model.name, *model.aliases):
        raise UnknownModelError("no model of that name is served here; see /v1/models", param="model")
    return json_response(_card(model, name))


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "tabstop",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "fim": model.text.fill.name or False,
        "aliases": [other for other in (model.name, *model.aliases) if other != name],
    }


ROUTES = (
    Route("POST", "/completions", "Complete a text", Generating(completion_call, CompletionFormat.of), CompletionBody),
    Route("POST", "/chat/completions", "Answer a chat", Generating(chat_call, ChatFormat.of), ChatBody),
    Route("GET", "/models", "List models", _models),
    Route("GET", "/models/{model:path}", "Describe a model", _model),
)
