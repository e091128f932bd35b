"""Tabstop: a serving engine for code models. Public names only, imported lazily: `import tabstop` imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tabstop.llm import LLM
    from tabstop.outputs import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from tabstop.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tabstop.outputs import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'tabstop' has no attribute {name!r}")
