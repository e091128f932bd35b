"""Where checkpoints keep the rows of q, k and v. In memory they are always q, then k, then v, head by head.

The rows of q and k heads are put in such an order that a rotation pairs row i with row i + head_dim / 2, whatever the
family pairs and however much of a head it turns: attention compares q and k only with each other, so any order that
both share will do, and all families run through one rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from tabstop.errors import UnsupportedModelError
from tabstop.layers.linear import Part
from tabstop.quant import Placement


@dataclass(frozen=True, slots=True)
class Heads:
    """An attention layer's heads over all ranks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    order: tuple[int, ...] | None  # of the rows of each q and k head; None: as stored

    def part(self, name: str, num_rows: int, starts: tuple[int, ...], order: tuple[int, ...] | None) -> Part:
        """A part of whole heads, the first rows of which lie at `starts` in a tensor of `num_rows` rows."""
        placement = Placement(num_rows, self.head_dim, starts, order)
        return Part(name, len(starts) * self.head_dim, self.head_dim, placement)

    def parts(self, name: str, starts: tuple[tuple[int, ...], ...]) -> list[Part]:
        """q, k and v inside one tensor."""
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        orders = (self.order, self.order, None)
        return [self.part(name, num_rows, each, order) for each, order in zip(starts, orders, strict=True)]


Projections = Callable[[Heads], list[Part]]
"""Heads → the parts of q, k and v."""


def rotary_order(head_dim: int, rotary_dim: int, interleaved: bool) -> tuple[int, ...] | None:
    """For each row of a q or k head in memory the stored row; None when they are the same.

    `interleaved`: stored rows 2i and 2i + 1 are a pair, else i and i + rotary_dim / 2. Rows from rotary_dim on are not
    turned: half of them follows the first members of the pairs, half the second ones.
    """
    if not rotary_dim:
        return None
    if head_dim % 2 or rotary_dim % 2:
        raise UnsupportedModelError(f"heads of {head_dim} values, {rotary_dim} of them turned: both must be even")
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2) for i in range(rotary_dim // 2)]
    rest, middle = list(range(rotary_dim, head_dim)), (head_dim - rotary_dim) // 2
    order = [first for first, _ in pairs] + rest[:middle] + [second for _, second in pairs] + rest[middle:]
    return None if order == list(range(head_dim)) else tuple(order)


def separate(heads: Heads) -> list[Part]:
    """A matrix for each of q, k and v."""
    counts = {"q_proj": heads.num_heads, "k_proj": heads.num_kv_heads, "v_proj": heads.num_kv_heads}
    found = []
    for name, count in counts.items():
        num_rows = count * heads.head_dim
        if heads.order is None or name == "v_proj":
            found.append(Part(name, num_rows, heads.head_dim))
        else:
            found.append(heads.part(name, num_rows, _starts(heads, 0, count), heads.order))
    return found


def stacked(name: str) -> Projections:
    """One matrix: all q heads, all k heads, all v heads."""

    def parts(heads: Heads) -> list[Part]:
        counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        firsts = (0, *accumulate(counts[:2]))
        return heads.parts(name, tuple(_starts(heads, first, n) for first, n in zip(firsts, counts, strict=True)))

    return parts


def head_by_head(name: str) -> Projections:
    """One matrix: q, k and v of the first head, then of the second, …"""

    def parts(heads: Heads) -> list[Part]:
        assert heads.num_heads == heads.num_kv_heads
        dim = heads.head_dim
        return heads.parts(
            name, tuple(tuple(3 * dim * head + dim * place for head in range(heads.num_heads)) for place in range(3))
        )

    return parts


def grouped(name: str, num_groups: int) -> Projections:
    """One matrix of `num_groups` equal groups of heads: in each all q heads, all v heads, all k heads."""

    def parts(heads: Heads) -> list[Part]:
        assert heads.num_heads == heads.num_kv_heads
        if heads.num_heads % num_groups:
            raise UnsupportedModelError(f"{heads.num_heads} heads; this family packs them in {num_groups} equal groups")
        per_group = heads.num_heads // num_groups

        def starts(place: int) -> tuple[int, ...]:
            firsts = [(3 * group + place) * per_group for group in range(num_groups)]
            return tuple(start for first in firsts for start in _starts(heads, first, per_group))

        return heads.parts(name, (starts(0), starts(2), starts(1)))

    return parts


def _starts(heads: Heads, first: int, count: int) -> tuple[int, ...]:
    """First rows of `count` heads from head number `first` on."""
    return tuple(index * heads.head_dim for index in range(first, first + count))
