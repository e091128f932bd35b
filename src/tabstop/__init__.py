"""Tabstop: a serving engine for code models. Public names only, imported lazily: `import tabstop` imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tabstop.llm import LLM
    from tabstop.outputs import GuidedDecodingParams, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = ["LLM", "GuidedDecodingParams", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from tabstop.llm import LLM

        return LLM
    if name in __all__:
        from tabstop import outputs

        return getattr(outputs, name)
    raise AttributeError(f"module 'tabstop' has no attribute {name!r}")
