"""The block pool on its own: states, publishing, finding and eviction."""

from __future__ import annotations

from array import array

from tabstop.cache.blocks import BlockPool, chain_key, root_key


def ids(*values: int) -> bytes:
    return array("I", values).tobytes()


ROOT = root_key("")


def published(pool: BlockPool, *contents: bytes, step: int = 0, root: bytes = ROOT):
    """A sequence's blocks, published one behind the other."""
    blocks, parent = [], root
    for content in contents:
        blocks.append(pool.allocate())
        parent = pool.publish(blocks[-1], parent, content, step) or parent
    return blocks


def test_freed_blocks_stay_findable_until_evicted_tails_first():
    pool = BlockPool(4, 2)
    blocks = published(pool, ids(1, 2), ids(3, 4), ids(5, 6))
    for block in reversed(blocks):
        pool.release(block)
    pool.check()
    assert pool.find(ROOT, ids(1, 2, 3, 4, 5, 6, 7), 6, 1).blocks == blocks
    pool.allocate(), pool.allocate()  # the free one, then the tail of the chain
    pool.check()
    assert pool.find(ROOT, ids(1, 2, 3, 4, 5, 6, 7), 6, 1).blocks == blocks[:2]


def test_partial_match_takes_the_longest_common_start_of_an_earlier_step():
    pool = BlockPool(8, 4)
    published(pool, ids(1, 2, 3, 4), ids(5, 6), step=3)
    [longer] = published(pool, ids(5, 6, 7, 8), step=4, root=chain_key(ROOT, ids(1, 2, 3, 4)))
    prompt = ids(1, 2, 3, 4, 5, 6, 7, 9)
    assert pool.find(ROOT, prompt, 7, step=5).num_partial == 3
    assert pool.find(ROOT, prompt, 7, step=5).partial is longer
    assert pool.find(ROOT, prompt, 7, step=4).num_partial == 2
    assert pool.find(ROOT, prompt, 7, step=3).num_partial == 0
    assert len(pool.find(ROOT, prompt, 7, step=3).blocks) == 1


def test_equal_content_is_findable_once():
    pool = BlockPool(4, 2)
    [first] = published(pool, ids(1, 2))
    [second] = published(pool, ids(1, 2))
    pool.release(second)
    assert pool.find(ROOT, ids(1, 2, 3), 2, 1).blocks == [first] and not pool.is_cached(second)
    pool.check()


def test_content_is_compared_on_a_hit():
    pool = BlockPool(4, 2)
    [block] = published(pool, ids(1, 2))
    block.ids = ids(9, 9)  # as if two contents had one key
    assert pool.find(ROOT, ids(1, 2, 3), 2, 1).blocks == []


def test_scopes_have_other_roots():
    pool = BlockPool(4, 2)
    published(pool, ids(1, 2), ids(3), root=root_key("a"))
    match = pool.find(root_key("b"), ids(1, 2, 3, 4), 3, 1)
    assert match.blocks == [] and match.partial is None


def test_held_blocks_outlive_their_owner():
    pool = BlockPool(2, 2)
    [block] = published(pool, ids(1, 2))
    pool.hold(block)
    pool.release(block)
    assert pool.num_held == 1 and pool.ledger(0, 0).reserved == 2
    assert pool.allocate() is not None and pool.allocate() is None
    pool.unhold(block)
    assert pool.num_held == 0 and pool.allocate() is block
    pool.check()


def test_blocks_that_are_not_to_be_retained_go_first():
    pool = BlockPool(3, 2)
    kept = published(pool, ids(1, 2))[0]
    dropped = pool.allocate()
    pool.publish(dropped, ROOT, ids(3, 4), 0, retain=False)
    pool.release(kept)
    pool.release(dropped)
    pool.allocate()
    assert pool.allocate() is dropped


def test_clear_forgets_what_nobody_owns():
    pool = BlockPool(3, 2)
    owned, freed = published(pool, ids(1, 2), ids(3, 4))
    pool.release(freed)
    pool.clear()
    pool.check()
    assert pool.find(ROOT, ids(1, 2, 3, 4, 5), 4, 1).blocks == [owned]


def test_equal_ids_behind_other_histories_are_other_content():
    pool = BlockPool(6, 2)
    first = published(pool, ids(1, 2), ids(3, 4))
    second = published(pool, ids(5, 6), ids(3, 4))
    assert pool.find(ROOT, ids(1, 2, 3, 4, 0), 4, 1).blocks == first
    assert pool.find(ROOT, ids(5, 6, 3, 4, 0), 4, 1).blocks == second
