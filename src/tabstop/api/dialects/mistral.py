"""Mistral's dialect for holes: /fim/completions. The answer is shaped as a chat's."""

from __future__ import annotations

from collections.abc import Mapping

from tabstop.api import Route
from tabstop.api.chunks import ChatFormat
from tabstop.api.endpoints import Generating
from tabstop.api.fields import Caller, shared_fields
from tabstop.api.holes import hole_fields, surroundings
from tabstop.api.sampling import chat_num_logprobs, refuse_prompt_logprobs
from tabstop.api.schema import AroundHole, Seed
from tabstop.call import Call
from tabstop.text.fim import Hole


class MistralBody(AroundHole, kw_only=True):
    """POST /v1/fim/completions."""

    prompt: str
    suffix: str | None = None
    random_seed: Seed | None = None


def fim_call(body: MistralBody, caller: Caller) -> Call:
    """A hole even where the suffix is empty. Raises InputError or NotSupportedError, naming the parameter."""
    refuse_prompt_logprobs(body)
    fields = shared_fields(body, caller)
    if body.random_seed is not None:
        fields["seed"] = body.random_seed
    hole = Hole(body.prompt, body.suffix or "", surroundings(body), body.fim_order or "")
    fields |= hole_fields(body) | {"num_logprobs": chat_num_logprobs(body)}
    return Call(prompts=(hole,), max_tokens=body.max_tokens, **fields)


class FimFormat(ChatFormat):
    """/v1/fim/completions."""

    id_prefix = "fim-"
    no_text: Mapping[str, str] = {}


ROUTES = (Route("POST", "/fim/completions", "Fill a hole (Mistral)", Generating(fim_call, FimFormat.of), MistralBody),)
