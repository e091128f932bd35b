"""Tabstop: a serving engine for code models. Public names only, imported lazily: `import tabstop` imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tabstop.llm import LLM, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingParams"):
        from tabstop import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'tabstop' has no attribute {name!r}")
