"""A call's prompts → token ids of one model, with what reading the answers needs. Knows texts; no engine, no HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace

from msgspec import structs

from tabstop.answer import EncodedPrompt
from tabstop.call import Call, Prompt, TextPrompt, TokenPrompt
from tabstop.engine.bounds import check_sampling
from tabstop.errors import ContextLengthError, InputError, NotSupportedError
from tabstop.text import ModelText
from tabstop.text.chat import Conversation, encode_chat
from tabstop.text.fim import Hole
from tabstop.text.fim_transcode import parse_foreign
from tabstop.text.reasoning import thinking_in
from tabstop.text.shaping import overlap_of
from tabstop.text.tokenizer import Tokenizer
from tabstop.tools.constraint import calls_constraint
from tabstop.types import EngineInfo, Sampling

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
        if call.max_tokens == 0 or call.num_prompt_reported is not None:  # nothing heals, or all tokens are to be shown
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
    if policy.transcodes and isinstance(prompt, TextPrompt) and call.num_prompt_reported is None:
        foreign = parse_foreign(prompt.text, lambda token: text.tokenizer.token_id(token) is not None)
    if foreign is None:
        encoded = _encode_prompt(prompt, call, text, info)
        if call.tools is not None and isinstance(prompt, Conversation):
            return _with_tools(encoded, call, text)
        heals = isinstance(prompt, TextPrompt) and policy.heals_prompt(prompt, call)
        healed = _healed(encoded, text) if heals else encoded
        return healed if _can_precede(healed.healed, call) else encoded
    encoded = _encode_hole(foreign[1], call, text, info, policy)
    assert encoded.fill is not None
    encoded.fill.transcoded = foreign[0]
    return encoded


GIVEN = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window"),
    *("logit_bias", "allowed_token_ids"),
)
"""Fields of Call that are Sampling's; None: the checkpoint decides."""


def make_sampling(call: Call, text: ModelText, vocab_size: int, seed: int) -> Sampling:
    """How a call's tokens are drawn. Raises InputError naming the parameter."""
    given = {name: value for name in GIVEN if (value := getattr(call, name)) is not None}
    banned: list[tuple[int, ...]] = [(token_id,) for token_id in call.banned_ids]
    for word in call.bad_words:
        banned += _runs_of(word, text.tokenizer)
    sampling = structs.replace(text.sampling, **given, seed=seed, banned=tuple(dict.fromkeys(banned)))
    counts = {"num_logprobs": call.num_reported, "num_prompt_logprobs": call.num_prompt_reported}
    sampling = structs.replace(sampling, **counts)
    if call.allowed_token_ids == ():
        raise InputError("allowed_token_ids is empty; leave it out", param="allowed_token_ids")
    check_sampling(sampling, vocab_size)
    return sampling


def _runs_of(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The ids that spell a word: at the start of a line, and after a blank where that is another spelling."""
    if not word.strip():
        raise InputError("a bad word is empty; leave it out", param="bad_words")
    spellings = dict.fromkeys((word, " " + word.lstrip()))
    return [tuple(tokenizer.encode(spelling, control=False)) for spelling in spellings]


def _healed(prompt: EncodedPrompt, text: ModelText) -> EncodedPrompt:
    cut = text.healer.cut(prompt.ids, keep=1)
    return replace(prompt, ids=cut.ids, healed=cut.removed, num_healed=cut.num_removed)


def _with_tools(prompt: EncodedPrompt, call: Call, text: ModelText) -> EncodedPrompt:
    """The prompt of an answer that may, or must, call tools. Raises NotSupportedError, InputError."""
    if text.tools is None:
        raise NotSupportedError(
            "this model's chat template shows no way to call tools; leave `tools` out, or start the server with "
            "--tool-format",
            param="tools",
        )
    assert call.tools is not None
    if not (call.tools.is_required or call.constraints):
        return replace(prompt, tools=text.tools)
    content = call.constraints[0] if call.constraints else None
    spec = calls_constraint(text.tools, call.tools, text.tokenizer.control_tokens, content)
    return replace(prompt, tools=text.tools, constraints=(spec,))


def _can_precede(healed: bytes, call: Call) -> bool:
    """A grammar is about characters: what stands before its text has no half ones."""
    return not call.constraints or healed.decode(errors="replace").encode() == healed


def _encode_hole(hole: Hole, call: Call, text: ModelText, info: EngineInfo, policy: PromptPolicy) -> EncodedPrompt:
    """What does not fit beside the answer is cut."""
    reserve = call.max_tokens if call.max_tokens is not None else call.default_max_tokens
    if reserve is None:
        reserve = info.max_model_len // RESERVED_PART
    healer = text.healer if policy.heals_prompt(hole, call) else None
    room = max(1, info.max_model_len - reserve)
    filled = text.fill.encode(hole, room, healer)
    if not _can_precede(filled.healed, call):
        filled = text.fill.encode(hole, room, None)
    ids = filled.ids or _bos_of(text)
    _check_ids(ids, info)
    return EncodedPrompt(
        ids,
        hole.prefix + hole.ahead if call.echo else "",
        filled.report,
        filled.healed,
        filled.report.healed_tokens,
        filled.stop_strings,
        overlap_of(hole.with_newlines().suffix) if text.fill.family else "",
        hole.has_crlf,
    )


def _encode_prompt(prompt: Prompt, call: Call, text: ModelText, info: EngineInfo) -> EncodedPrompt:
    tokenizer, echo, wants_echo, thinking = text.tokenizer, "", call.echo, None
    assert not isinstance(prompt, Hole)
    is_cut = call.truncate_prompt is not None
    most = info.max_model_len * tokenizer.max_token_chars
    if not is_cut and _num_characters(prompt) > most:  # no need to encode it to know
        raise too_long(f"over {info.max_model_len}", info, "prompt")
    if isinstance(prompt, TextPrompt):
        ids, echo = tokenizer.encode(prompt.text, bos=prompt.bos), prompt.text
    elif isinstance(prompt, TokenPrompt):
        ids, echo = prompt.ids, tokenizer.decode(prompt.ids) if wants_echo else ""
    else:
        ids = encode_chat(text.template, tokenizer, prompt)
        thinking = thinking_in(text.reasoning, tokenizer, ids, prompt.begun)
    ids = ids or _bos_of(text)
    _check_ids(ids, info)
    if is_cut and (cut := _truncated(ids, call, text, info)) != ids:
        ids, echo = cut, tokenizer.decode(cut) if wants_echo else ""
    return EncodedPrompt(ids, echo if wants_echo else "", thinking=thinking)


def _truncated(ids: list[int], call: Call, text: ModelText, info: EngineInfo) -> list[int]:
    """The last tokens that were asked for, or that fit beside the answer; a BOS in front stays there."""
    room = info.max_model_len - (1 if call.max_tokens is None else call.max_tokens)
    most = max(1, min(room, call.truncate_prompt or room))
    if len(ids) <= most:
        return ids
    opening = ids[:1] if ids[0] == text.tokenizer.bos_id and most > 1 else []
    return opening + ids[len(ids) - most + len(opening) :]


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
    return 0 if isinstance(prompt, TokenPrompt) else sum(len(message["content"] or "") for message in prompt.messages)


def too_long(num_tokens: str, info: EngineInfo, param: str) -> ContextLengthError:
    """The error of a prompt that leaves no room."""
    return ContextLengthError(
        f"the prompt has {num_tokens} tokens; this model's context is {info.max_model_len} tokens, prompt and "
        "completion together: shorten the prompt",
        param=param,
    )
