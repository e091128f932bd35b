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
        "tokens": [_name(token.chosen) for token in tokens],
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
        shown.setdefault(_name(entry), _shown(entry))
    return shown


def _name(entry: Likelihood) -> str:
    r"""A key: parts of characters are told apart as `bytes:\xe2\x80`, as OpenAI's completions do."""
    try:
        return entry.spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.spelled)


def _chat_entry(entry: Likelihood) -> dict[str, Any]:
    return {"token": entry.text, "logprob": _shown(entry), "bytes": list(entry.spelled)}


def _llama_entry(entry: Likelihood) -> dict[str, Any]:
    return {"id": entry.token_id, **_chat_entry(entry)}


def _shown(entry: Likelihood) -> float:
    return max(entry.logprob, LEAST)
