"""Log-probabilities in the shape of each dialect. JSON has no infinity: less than LEAST is shown as LEAST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tabstop.text.reporting import Likelihood, ReportedToken

LEAST = -9999.0


def completion_logprobs(tokens: Sequence[ReportedToken]) -> dict[str, Any] | None:
    """Of /v1/completions: lists side by side. The chosen token is always among the likeliest; null without tokens."""
    if not tokens:
        return None
    return {
        "tokens": [token.chosen.text for token in tokens],
        "token_logprobs": [_shown(token.chosen) for token in tokens],
        "top_logprobs": [_by_text([*token.top, token.chosen]) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[ReportedToken]) -> dict[str, Any] | None:
    """Of chats."""
    if not tokens:
        return None
    content = [_chat_entry(token.chosen) | {"top_logprobs": list(map(_chat_entry, token.top))} for token in tokens]
    return {"content": content, "refusal": None}


def llama_probabilities(tokens: Sequence[ReportedToken]) -> list[dict[str, Any]]:
    """llama.cpp's completion_probabilities."""
    return [_llama_entry(token.chosen) | {"top_logprobs": list(map(_llama_entry, token.top))} for token in tokens]


def _by_text(entries: Sequence[Likelihood]) -> dict[str, float]:
    """Tokens may be spelled alike: the likelier, which comes first, is shown."""
    shown: dict[str, float] = {}
    for entry in entries:
        shown.setdefault(entry.text, _shown(entry))
    return shown


def _chat_entry(entry: Likelihood) -> dict[str, Any]:
    return {"token": entry.text, "logprob": _shown(entry), "bytes": list(entry.spelled)}


def _llama_entry(entry: Likelihood) -> dict[str, Any]:
    return {"id": entry.token_id, **_chat_entry(entry)}


def _shown(entry: Likelihood) -> float:
    return max(entry.logprob, LEAST)
