"""Mistral's dialect for holes: /fim/completions. The answer is shaped as a chat's."""

from __future__ import annotations

from collections.abc import Sequence

from tabstop.api import Route
from tabstop.api.chunks import ChatFormat, chat_choices
from tabstop.api.endpoints import generate
from tabstop.api.fields import Caller, shared_fields
from tabstop.api.holes import fill_object, hole_fields, surroundings
from tabstop.api.sampling import chat_num_logprobs, refuse_prompt_logprobs
from tabstop.api.schema import AroundHole, Seed
from tabstop.call import Call, TextDelta, Usage
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

    def delta(self, delta: TextDelta) -> bytes:
        content = b""
        if delta.text or delta.logprobs:
            shown = TextDelta(delta.index, delta.text, [], logprobs=delta.logprobs)
            content = self._event(chat_choices([shown], "delta"))
        if not delta.finish:
            return content
        ended = TextDelta(delta.index, "", [], delta.finish, delta.stop_reason, confidence=delta.confidence)
        return content + self._event(chat_choices([ended], "delta"), **fill_object(delta.fill))

    def whole(self, choices: Sequence[TextDelta], usage: Usage) -> bytes:
        return self._whole(chat_choices(choices, "message"), usage, choices[0].fill)


ROUTES = (Route("POST", "/fim/completions", "Fill a hole (Mistral)", generate(fim_call, FimFormat.of), MistralBody),)
