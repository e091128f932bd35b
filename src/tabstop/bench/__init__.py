"""The benchmark: measure any endpoint, compare two honestly, price a token, size a fleet.

Knows nothing of Tabstop's own engine. Public names are imported lazily: `bench_app`, `cost`, `plan` are its commands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tabstop.bench.cli import bench_app, cost, plan

__all__ = ["bench_app", "cost", "plan"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from tabstop.bench import cli

        return getattr(cli, name)
    raise AttributeError(f"module 'tabstop.bench' has no attribute {name!r}")
