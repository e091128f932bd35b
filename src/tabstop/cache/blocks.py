"""The block pool: which KV blocks are owned, cached or free, and which content the cached ones hold.

Knows block numbers and token ids; no tensors, no requests. A block's content is *published* under a key that chains its
ids to its predecessor's key, so equal keys mean equal token histories within one cache scope (the automatic prefix
caching of vLLM, SOSP 2023, with content compared on a hit). Unfinished blocks are published under their
predecessor's key only; `find` offers the one with the longest common start for copying.

A block is in exactly one state:

    free ──allocate──► owned (num_owners > 0) ──last release──► free      when unpublished
     ▲                   ▲                                  └─► cached    when published
     └──── evict ────────┴──────────── share ◄──────────────────┘
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from tabstop.types import Ledger

NUM_PARTIAL_CANDIDATES = 8
"""How many unfinished blocks behind one key are compared, newest first: bounds a lookup's time."""

ID_BYTES = 4


@dataclass(slots=True, eq=False)
class Block:
    """One KV block. Fields below `num_owners` are set by publish and cleared by eviction."""

    index: int
    num_owners: int = 0  # requests whose table holds it, plus holds
    num_holds: int = 0  # copies in flight that read it
    parent: bytes | None = None  # key of the history before this block; None = unpublished
    key: bytes | None = None  # key of the history that ends with this block; None = unfinished
    ids: bytes = b""  # the published tokens, uint32 each
    step: int = -1  # the step that writes the published content
    retain: bool = True

    @property
    def is_only_held(self) -> bool:
        return 0 < self.num_owners == self.num_holds


@dataclass(slots=True)
class Match:
    """What the cache knows of a prompt's start. Nothing is owned yet."""

    blocks: list[Block] = field(default_factory=list)  # whole blocks to share
    keys: list[bytes] = field(default_factory=list)  # their keys
    partial: Block | None = None  # a block whose first `num_partial` tokens continue the match, to be copied
    num_partial: int = 0


def root_key(scope: str) -> bytes:
    """The key before a sequence's first block; scopes never share."""
    return hashlib.blake2b(scope.encode(), digest_size=16).digest()


def chain_key(parent: bytes, ids: bytes) -> bytes:
    return hashlib.blake2b(parent + ids, digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. All methods are O(1) but `find` (O(prompt)) and `check`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = [Block(index) for index in range(num_blocks)]
        self._free = deque(self.blocks)
        self._cached: OrderedDict[int, Block] = OrderedDict()  # eviction order: first goes first
        self._by_key: dict[bytes, Block] = {}
        self._children: dict[bytes, dict[int, Block]] = {}  # parent key → blocks published behind it
        self.num_held = 0  # blocks owned by holds alone

    @property
    def num_available(self) -> int:
        """Blocks that allocate() can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_owned(self) -> int:
        return len(self.blocks) - self.num_available

    def is_cached(self, block: Block) -> bool:
        """Nobody owns it, so sharing it lowers num_available."""
        return block.index in self._cached

    def allocate(self) -> Block | None:
        """A block with one owner and no content, or None: then somebody must be preempted."""
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block = self._cached.popitem(last=False)[1]
            self._unpublish(block)
        else:
            return None
        block.num_owners = 1
        return block

    def share(self, block: Block) -> None:
        """One more owner of a cached or owned block."""
        self._cached.pop(block.index, None)
        self._count(block, owners=1)

    def release(self, block: Block) -> None:
        """One owner less. Release a sequence's blocks last to first, so that tails are evicted before heads."""
        self._count(block, owners=-1)

    def hold(self, block: Block) -> None:
        """Keeps a copy's source from being reused until the copy has run."""
        self._cached.pop(block.index, None)
        self._count(block, owners=1, holds=1)

    def unhold(self, block: Block) -> None:
        self._count(block, owners=-1, holds=-1)

    def _count(self, block: Block, owners: int, holds: int = 0) -> None:
        self.num_held -= block.is_only_held
        block.num_owners += owners
        block.num_holds += holds
        self.num_held += block.is_only_held
        assert 0 <= block.num_holds <= block.num_owners, f"block {block.index} released more often than shared"
        if block.num_owners:
            return
        if block.parent is None:
            self._free.append(block)
        else:
            self._cached[block.index] = block
            if not block.retain:
                self._cached.move_to_end(block.index, last=False)

    def publish(self, block: Block, parent: bytes, ids: bytes, step: int, retain: bool = True) -> bytes | None:
        """Makes a block's content findable: `ids` behind `parent`, written by `step`.

        Returns the block's key when it is full, else None. Content that is findable already stays where it is; this
        block then stays unpublished and is freed with its owner.
        """
        key = chain_key(parent, ids) if len(ids) == self.block_size * ID_BYTES else None
        if key is not None and self._by_key.get(key, block) is not block:
            return key
        if block.parent is not None and block.parent != parent:
            self._unpublish(block)
        block.parent, block.key, block.ids, block.step, block.retain = parent, key, ids, step, retain
        self._children.setdefault(parent, {})[block.index] = block
        if key is not None:
            self._by_key[key] = block
        return key

    def _unpublish(self, block: Block) -> None:
        assert block.parent is not None
        siblings = self._children[block.parent]
        del siblings[block.index]
        if not siblings:
            del self._children[block.parent]
        if block.key is not None:
            del self._by_key[block.key]
        block.parent = block.key = None
        block.ids, block.step = b"", -1

    def find(self, root: bytes, ids: bytes, max_tokens: int, step: int) -> Match:
        """The longest cached start of `ids` (uint32 bytes) of at most `max_tokens` tokens.

        Whole blocks may come from the step being planned, since a forward stores every row's keys and values before
        any row attends. A copy runs before the forward, so its source must come from an earlier step than `step`.
        """
        match, parent, width = Match(), root, self.block_size * ID_BYTES
        for start in range(0, max_tokens // self.block_size * width, width):
            content = ids[start : start + width]
            block = self._by_key.get(chain_key(parent, content))
            if block is None or block.ids != content or block.parent != parent:
                break
            assert block.key is not None
            match.blocks.append(block)
            match.keys.append(parent := block.key)
        num_whole = len(match.blocks) * self.block_size
        rest = ids[num_whole * ID_BYTES : max_tokens * ID_BYTES]
        self._find_partial(match, parent, rest, step)
        return match

    def _find_partial(self, match: Match, parent: bytes, rest: bytes, step: int) -> None:
        candidates = self._children.get(parent, {}).values()
        for _, block in zip(range(NUM_PARTIAL_CANDIDATES), reversed(candidates), strict=False):
            num_common = _num_common_tokens(block.ids, rest)
            if block.step < step and num_common > match.num_partial:
                match.partial, match.num_partial = block, num_common

    def forget(self, blocks: list[Block]) -> None:
        """Makes the content of owned blocks findable no more; their owners keep them."""
        for block in blocks:
            if block.parent is not None:
                self._unpublish(block)

    def clear(self) -> None:
        """Forgets all content that nobody owns."""
        while self._cached:
            block = self._cached.popitem(last=False)[1]
            self._unpublish(block)
            self._free.append(block)

    def ledger(self, num_used_tokens: int, num_waste_tokens: int) -> Ledger:
        """The pool in token slots; the caller says how the owned blocks are filled."""
        size = self.block_size
        return Ledger(
            total=len(self.blocks) * size,
            used=num_used_tokens,
            waste=num_waste_tokens,
            reserved=self.num_held * size,
            cached=len(self._cached) * size,
            free=len(self._free) * size,
        )

    def check(self) -> None:
        """Asserts every invariant of the pool by recounting. Slow; for tests and idle moments."""
        free = {block.index for block in self._free}
        assert len(free) == len(self._free) and not free & self._cached.keys()
        for block in self.blocks:
            assert (block.num_owners > 0) == (block.index not in free and block.index not in self._cached)
            assert (block.parent is not None) == (block.index in self._children.get(block.parent or b"", {}))
            assert block.parent is not None or block.index not in self._cached
            assert block.key is None or self._by_key[block.key] is block
        assert sum(len(siblings) for siblings in self._children.values()) == sum(
            block.parent is not None for block in self.blocks
        )
        assert self.num_held == sum(block.is_only_held for block in self.blocks)


def _num_common_tokens(left: bytes, right: bytes) -> int:
    """Length of the common start of two uint32 arrays."""
    num_bytes = min(len(left), len(right))
    if left[:num_bytes] == right[:num_bytes]:
        return num_bytes // ID_BYTES
    return next(at for at in range(num_bytes) if left[at] != right[at]) // ID_BYTES
