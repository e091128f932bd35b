"""Attention over paged KV memory: the protocol, the registry, and the choice.

One code path for prompts, decoding and drafts: a row of the batch has `query_len` new tokens at the end of a context of
`context_len`. A backend owns the layout of its KV tensors. A new backend is one file and one line in BACKENDS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tabstop.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from tabstop.cache import CacheSpec
    from tabstop.engine.plan import Copy
    from tabstop.kernels.attention import Sharing

BACKENDS: dict[str, str] = {
    "triton": "tabstop.attention.triton:TritonAttention",
    "cpu": "tabstop.attention.cpu:CpuAttention",
    "sdpa": "tabstop.attention.sdpa:SdpaAttention",
    "reference": "tabstop.attention.reference:ReferenceAttention",
}
"""Name → module:class, in order of preference; imported only when considered."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a model asks of a backend; a backend declines by it before anything is allocated."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    block_size: int
    window: int | None = None


@dataclass(slots=True)
class AttentionBatch:
    """One step's rows, made once by worker/batch.py. T tokens in R rows, rows one after the other.

    Tensors are on the model's device; the lists are the same numbers for backends that loop on the host.
    """

    query_lens: list[int]  # [R] new tokens of each row, ≥ 1
    context_lens: list[int]  # [R] tokens of the row's sequence after this step, new ones included
    query_starts: torch.Tensor  # int32 [R + 1] first token of each row, and T
    contexts: torch.Tensor  # int32 [R] context_lens
    block_tables: torch.Tensor  # int32 [R, ≥ blocks of the longest row]; entries past a row's context are arbitrary
    kv_slots: torch.Tensor  # int64 [T] where each new token's K and V go: block × block_size + offset
    sharing: Sharing | None = None  # None where the backend has no use for it


class AttentionBackend(Protocol):
    """How attention is computed and how its cache is laid out."""

    name: str
    sharing_width: int  # rows for which a shared prefix is read once; 0: `plan` has no use for AttentionBatch.sharing

    @staticmethod
    def refuse(need: Need) -> str | None:
        """None when this backend can do it, else the reason (printed when all decline)."""
        ...

    def __init__(self, need: Need) -> None: ...

    def allocate(self, spec: CacheSpec, num_blocks: int) -> Any:
        """The zeroed KV memory of one layer, in this backend's layout."""
        ...

    def copy(self, layers: Sequence[Any], copies: Sequence[Copy]) -> None:
        """Runs all copies of a step (engine/plan.py) in all layers' memory; no source is a target."""
        ...

    def plan(self, batch: AttentionBatch) -> Any:
        """What all layers of a step share; called once a step."""
        ...

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any, meta: Any, scale: float, window: int | None
    ) -> torch.Tensor:
        """Stores k and v of ALL rows, then attends. q [T, heads, dim], k and v [T, kv_heads, dim] → [T, heads, dim].

        Token i of a row sees positions ≤ its own, and with a window only the last `window` of them.
        """
        ...


@runtime_checkable
class FusedBackend(AttentionBackend, Protocol):
    """A backend that also takes the projections' one matrix: rotation and store are one kernel. `run` in two halves."""

    def rotate_and_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: Any, meta: Any
    ) -> torch.Tensor:
        """qkv [T, (heads + 2 · kv_heads) · dim] → turned q [T, heads, dim]; stores turned k, and v, of all rows.

        cos, sin: [T, 1, dim / 2] of the tokens' positions, of any float type.
        """
        ...

    def attend(self, q: torch.Tensor, kv: Any, meta: Any, scale: float, window: int | None) -> torch.Tensor:
        """Attends over what is stored. q [T, heads, dim] → [T, heads, dim], undefined for tokens of no row."""
        ...


def load_backend(name: str) -> type[AttentionBackend]:
    """The class behind a registry name. Raises ConfigError for an unknown one."""
    if name not in BACKENDS:
        raise ConfigError(f"--attention is {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    module, _, cls = BACKENDS[name].partition(":")
    return getattr(import_module(module), cls)  # type: ignore[no-any-return]


def make_backend(need: Need, name: str = "auto") -> AttentionBackend:
    """The named backend, or the first that does not decline. Raises ConfigError listing every reason."""
    reasons = []
    for candidate in [name] if name != "auto" else BACKENDS:
        cls = load_backend(candidate)
        reason = cls.refuse(need)
        if reason is None:
            return cls(need)
        reasons.append(f"{candidate}: {reason}")
    raise ConfigError(f"no attention backend can serve {need}: " + "; ".join(reasons))
