"""Model families: architecture name → builder, and what every model offers the worker.

A family is one short file that composes parts (layers/) into the Decoder skeleton, and one line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from tabstop.attention import AttentionBackend
    from tabstop.cache import CacheSpec

FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "tabstop.models.llama:llama",
    "Qwen2ForCausalLM": "tabstop.models.qwen2:qwen2",
    "Qwen3ForCausalLM": "tabstop.models.qwen3:qwen3",
    "MistralForCausalLM": "tabstop.models.mistral:mistral",
    "MinistralForCausalLM": "tabstop.models.mistral:ministral",
    "Ministral3ForCausalLM": "tabstop.models.mistral:ministral3",
    "Starcoder2ForCausalLM": "tabstop.models.starcoder2:starcoder2",
    "GPTBigCodeForCausalLM": "tabstop.models.gpt_bigcode:gpt_bigcode",
    "GemmaForCausalLM": "tabstop.models.gemma:gemma",
    "PhiForCausalLM": "tabstop.models.phi:phi",
    "Phi3ForCausalLM": "tabstop.models.phi3:phi3",
    "StableLmForCausalLM": "tabstop.models.stablelm:stablelm",
    "GPTNeoXForCausalLM": "tabstop.models.gpt_neox:gpt_neox",
    "CodeGenForCausalLM": "tabstop.models.codegen:codegen",
    "GraniteForCausalLM": "tabstop.models.granite:granite",
    "ChatGLMModel": "tabstop.models.chatglm:chatglm",
    "GlmForCausalLM": "tabstop.models.glm:glm",
    "Glm4ForCausalLM": "tabstop.models.glm:glm4",
}
"""Architecture (config.json's `architectures[0]`) → module:builder, imported when asked for."""

ProgressCallback = Callable[[str, int, int], None]
"""(stage, done bytes, total bytes)"""


@dataclass(slots=True)
class StepContext:
    """What a forward needs beside ids: the step's attention plan and every layer's cache. Nothing is global."""

    attention: AttentionBackend
    meta: Any  # AttentionBackend.plan's answer
    kv: list[Any]  # one per layer, AttentionBackend.allocate's answer


class Model(Protocol):
    """A loaded decoder-only model. All tensors live on one device."""

    vocab_size: int
    cache_specs: list[CacheSpec]  # one per layer
    num_heads: int
    weight_bytes: int
    weights: str  # how they are held, for people

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, context: StepContext) -> torch.Tensor:
        """ids, positions int64 [T] → final hidden states [T, hidden], normed."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] → float32 [R, vocab_size]."""
        ...
