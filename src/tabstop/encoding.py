"""A call's prompts → token ids of one model, with what reading the answers needs. Knows texts; no engine, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tabstop.answer import EncodedPrompt
from tabstop.call import Call, Prompt, TextPrompt, TokenPrompt
from tabstop.errors import ContextLengthError, InputError
from tabstop.text import ModelText
from tabstop.text.chat import Conversation, encode_chat
from tabstop.text.fim import Hole
from tabstop.text.fim_transcode import parse_foreign
from tabstop.text.shaping import overlap_of
from tabstop.types import EngineInfo

RESERVED_PART = 8
"""Of the context, one part in so many is kept for the answer of a hole when its client names no limit."""


HEALING = ("off", "auto", "on")
"""Of which prompts the last tokens are healed when the request does not say: none, holes, all that are text."""


@dataclass(frozen=True, slots=True)
class PromptPolicy:
    """What a server does with prompts beside encoding them."""

    transcodes: bool = True  # raw prompts in another family's markers are laid out for the model
    heals: str = "off"  # of HEALING

    def heals_prompt(self, prompt: Prompt, call: Call) -> bool:
        if call.max_tokens == 0:  # nothing will come that could heal
            return False
        return (
            self.heals in (("on", "auto") if isinstance(prompt, Hole) else ("on",))
            if call.healing is None
            else call.healing
        )


def encode_prompts(call: Call, text: ModelText, info: EngineInfo, policy: PromptPolicy) -> list[EncodedPrompt]:
    """Ids of all prompts of a call. Slow: call it in a thread. Raises InputError for what cannot be a prompt."""
    return [_encode_one(prompt, call, text, info, policy) for prompt in call.prompts]


def _encode_one(prompt: Prompt, call: Call, text: ModelText, info: EngineInfo, policy: PromptPolicy) -> EncodedPrompt:
    if isinstance(prompt, Hole):
        return _encode_hole(prompt, call, text, info, policy)
    foreign = None
    if policy.transcodes and isinstance(prompt, TextPrompt):
        foreign = parse_foreign(prompt.text, lambda token: text.tokenizer.token_id(token) is not None)
    if foreign is None:
        encoded = _encode_prompt(prompt, call.echo, text, info)
        heals = isinstance(prompt, TextPrompt) and policy.heals_prompt(prompt, call)
        return _healed(encoded, text) if heals else encoded
    encoded = _encode_hole(foreign[1], call, text, info, policy)
    assert encoded.fill is not None
    encoded.fill.transcoded = foreign[0]
    return encoded


def _healed(prompt: EncodedPrompt, text: ModelText) -> EncodedPrompt:
    cut = text.healer.cut(prompt.ids, keep=1)
    return replace(prompt, ids=cut.ids, healed=cut.removed, num_healed=cut.num_removed)


def _encode_hole(hole: Hole, call: Call, text: ModelText, info: EngineInfo, policy: PromptPolicy) -> EncodedPrompt:
    """What does not fit beside the answer is cut."""
    reserve = call.max_tokens if call.max_tokens is not None else call.default_max_tokens
    if reserve is None:
        reserve = info.max_model_len // RESERVED_PART
    healer = text.healer if policy.heals_prompt(hole, call) else None
    filled = text.fill.encode(hole, max(1, info.max_model_len - reserve), healer)
    ids = filled.ids or _bos_of(text)
    _check_ids(ids, info)
    return EncodedPrompt(
        ids,
        hole.prefix + hole.ahead if call.echo else "",
        filled.report,
        filled.healed,
        filled.report.healed_tokens,
        filled.stop_strings,
        overlap_of(hole.suffix.replace("\r\n", "\n")) if text.fill.family else "",
        hole.has_crlf,
    )


def _encode_prompt(prompt: Prompt, wants_echo: bool, text: ModelText, info: EngineInfo) -> EncodedPrompt:
    tokenizer, echo = text.tokenizer, ""
    assert not isinstance(prompt, Hole)
    if _num_characters(prompt) > info.max_model_len * tokenizer.max_token_chars:  # no need to encode it to know
        raise too_long(f"over {info.max_model_len}", info, "prompt")
    if isinstance(prompt, TextPrompt):
        ids, echo = tokenizer.encode(prompt.text, bos=prompt.bos), prompt.text
    elif isinstance(prompt, TokenPrompt):
        ids, echo = prompt.ids, tokenizer.decode(prompt.ids) if wants_echo else ""
    else:
        ids = encode_chat(text.template, tokenizer, prompt)
    ids = ids or _bos_of(text)
    _check_ids(ids, info)
    return EncodedPrompt(ids, echo if wants_echo else "")


def _bos_of(text: ModelText) -> list[int]:
    """What stands for a prompt without tokens. Raises InputError when this model has nothing for it."""
    if text.tokenizer.bos_id is None:
        raise InputError("the prompt is empty; this model needs at least one token", param="prompt")
    return [text.tokenizer.bos_id]


def _check_ids(ids: list[int], info: EngineInfo) -> None:
    if not 0 <= min(ids) <= max(ids) < info.vocab_size:
        raise InputError(f"the prompt has token ids that are not between 0 and {info.vocab_size - 1}", param="prompt")


def _num_characters(prompt: TextPrompt | TokenPrompt | Conversation) -> int:
    """Of the texts in a prompt; ids have none."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return 0 if isinstance(prompt, TokenPrompt) else sum(len(message["content"]) for message in prompt.messages)


def too_long(num_tokens: str, info: EngineInfo, param: str) -> ContextLengthError:
    """The error of a prompt that leaves no room."""
    return ContextLengthError(
        f"the prompt has {num_tokens} tokens; this model's context is {info.max_model_len} tokens, prompt and "
        "completion together: shorten the prompt",
        param=param,
    )
