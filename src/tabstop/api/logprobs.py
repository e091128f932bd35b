"""Log-probabilities in OpenAI's and vLLM's shapes. JSON has no infinity: less than LEAST is shown as LEAST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tabstop.text.reporting import Likelihood, ReportedPrompt, ReportedToken

LEAST = -9999.0


@dataclass(frozen=True, slots=True)
class PromptShown:
    """What an answer shows of its prompts: so many likeliest tokens beside each token; None: nothing."""

    echoed: int | None = None  # in front of a completion's own
    listed: int | None = None  # as vLLM's prompt_logprobs


NO_PROMPTS = PromptShown()


def completion_logprobs(tokens: Sequence[ReportedToken], prompt: ReportedPrompt | None = None) -> dict[str, Any] | None:
    """Of /v1/completions: lists side by side. The chosen token is always among the likeliest; null without tokens.

    With a prompt its tokens come first; of the very first nothing is known.
    """
    opening = [] if prompt is None else [prompt.opening]
    unknown: list[None] = [None] * len(opening)
    if not tokens and not opening:
        return None
    return {
        "tokens": [*map(_text, opening), *(_name(token.chosen) for token in tokens)],
        "token_logprobs": [*unknown, *(_shown(token.chosen) for token in tokens)],
        "top_logprobs": [*unknown, *(_by_text([*token.top, token.chosen]) for token in tokens)],
        "text_offset": [*(0 for _ in opening), *(token.offset for token in tokens)],
    }


def echoed_logprobs(prompt: ReportedPrompt, num_top: int, tokens: Sequence[ReportedToken]) -> dict[str, Any] | None:
    """Of a completion that begins with its prompt."""
    shown = [ReportedToken(token.chosen, token.top[:num_top], token.offset) for token in prompt.tokens]
    return completion_logprobs([*shown, *tokens], prompt)


def prompt_logprobs(prompt: ReportedPrompt, num_top: int) -> list[dict[str, Any] | None]:
    """vLLM's: null for the first token, then by token id the likeliest ones and the token itself."""
    return [None, *({str(e.token_id): _vllm_entry(e) for e in (*t.top[:num_top], t.chosen)} for t in prompt.tokens)]


def chat_logprobs(tokens: Sequence[ReportedToken]) -> dict[str, Any] | None:
    """Of chats."""
    if not tokens:
        return None
    content = [chat_entry(token.chosen) | {"top_logprobs": list(map(chat_entry, token.top))} for token in tokens]
    return {"content": content, "refusal": None}


def _by_text(entries: Sequence[Likelihood]) -> dict[str, float]:
    """Tokens may be spelled alike: the likelier, which comes first, is shown."""
    shown: dict[str, float] = {}
    for entry in entries:
        shown.setdefault(_name(entry), _shown(entry))
    return shown


def _name(entry: Likelihood) -> str:
    r"""A key: parts of characters are told apart as `bytes:\xe2\x80`, as OpenAI's completions do."""
    return _text(entry.spelled)


def _text(spelled: bytes) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def chat_entry(entry: Likelihood) -> dict[str, Any]:
    """A token of a chat."""
    return {"token": entry.text, "logprob": _shown(entry), "bytes": list(entry.spelled)}


def _vllm_entry(entry: Likelihood) -> dict[str, Any]:
    return {"logprob": _shown(entry), "rank": entry.rank, "decoded_token": entry.text}


def _shown(entry: Likelihood) -> float:
    return max(entry.logprob, LEAST)
