from __future__ import annotations

import random

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.block_pool import BlockPool
from toka.scheduler.prefix_index import PrefixIndex
from toka.scheduler.retention import COMES_BACK


def blocks_of(*numbers: int) -> I32:
    return np.array(numbers, dtype=np.int32)


def pool_with_cached(*freed: list[int], num_blocks: int) -> tuple[BlockPool, PrefixIndex]:
    """A pool whose blocks all hold cached content and were given back in these groups, one after another."""
    index = PrefixIndex(num_blocks)
    pool = BlockPool(num_blocks, index)
    blocks = pool.take(num_blocks)
    index.register([bytes([i]) for i in range(num_blocks)], blocks)
    for group in freed:
        pool.release(blocks_of(*group))
    return pool, index


def test_take_gives_distinct_blocks_until_none_is_free() -> None:
    pool = BlockPool(5, PrefixIndex(5))
    assert sorted([*pool.take(2).tolist(), *pool.take(3).tolist()]) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(InvariantError):
        pool.take(1)


def test_blocks_without_content_go_before_cached_ones() -> None:
    index = PrefixIndex(4)
    pool = BlockPool(4, index)
    first, second = pool.take(1), pool.take(1)
    index.register([b"key"], first)
    pool.release(first)
    pool.release(second)
    assert pool.take(3).tolist() == [1, 2, 3] and b"key" in index
    assert pool.take(1).tolist() == [0] and b"key" not in index


def test_cached_blocks_go_least_recently_used_first() -> None:
    pool, index = pool_with_cached([2, 1], [3, 0], num_blocks=4)
    assert pool.take(3).tolist() == [2, 1, 3]
    assert len(index) == 1 and bytes([0]) in index


def test_what_is_worth_more_goes_later() -> None:
    pool, _ = pool_with_cached(num_blocks=4)
    pool.release(blocks_of(0, 1), COMES_BACK)
    pool.release(blocks_of(2, 3))
    assert pool.take(3).tolist() == [2, 3, 0]


def test_what_was_found_again_goes_later_and_so_does_all_before_it_that_others_hold() -> None:
    pool, _ = pool_with_cached([1], [2], num_blocks=4)
    pool.share(blocks_of(0, 1))  # a prefix of which block 0 is held by somebody
    pool.release(blocks_of(1, 0))
    pool.release(blocks_of(3))
    pool.release(blocks_of(0))
    assert pool.take(4).tolist() == [2, 3, 1, 0]


def test_a_new_content_is_not_worth_what_the_old_one_was() -> None:
    pool, index = pool_with_cached(num_blocks=2)
    pool.release(blocks_of(0), COMES_BACK)
    pool.take(1)
    index.register([b"other"], blocks_of(0))
    pool.release(blocks_of(0))
    pool.release(blocks_of(1), COMES_BACK)
    assert pool.take(2).tolist() == [0, 1]


def test_without_content_a_block_is_worth_nothing() -> None:
    index = PrefixIndex(2)
    pool = BlockPool(2, index)
    blocks = pool.take(2)
    pool.release(blocks, COMES_BACK)
    index.register([b"a", b"b"], pool.take(2))
    pool.release(blocks_of(0))
    pool.release(blocks_of(1))
    assert pool.take(2).tolist() == [0, 1]


def test_shared_again_is_recently_used_again() -> None:
    pool, _ = pool_with_cached([0, 1, 2], num_blocks=3)
    pool.share(blocks_of(0))
    assert pool.num_free == 2
    pool.release(blocks_of(0))
    assert pool.take(3).tolist() == [1, 2, 0]


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool, _ = pool_with_cached(num_blocks=1)
    pool.share(blocks_of(0))
    pool.release(blocks_of(0))
    assert pool.num_free == 0
    pool.release(blocks_of(0))
    assert pool.num_free == 1


def test_giving_back_what_nobody_holds_is_an_error() -> None:
    pool = BlockPool(2, PrefixIndex(2))
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(InvariantError, match="nobody holds"):
        pool.release(blocks)


def test_sharing_a_block_without_content_is_an_error() -> None:
    pool = BlockPool(2, PrefixIndex(2))
    with pytest.raises(InvariantError, match="without content"):
        pool.share(blocks_of(1))


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(2, PrefixIndex(2))
    pool.take(1)
    with pytest.raises(InvariantError):
        pool.check_invariants(blocks_of())


@pytest.mark.parametrize("seed", range(20))
def test_order_equals_that_of_a_plain_list(seed: int) -> None:
    """Without worths, against a pool made of two Python lists, over enough turns that the queue is squeezed many times."""
    rng = random.Random(seed)
    num_blocks, next_key = 12, 0
    index = PrefixIndex(num_blocks)
    pool = BlockPool(num_blocks, index, by_worth=False)
    blank, cached, held = list(range(num_blocks)), [], []  # the next to be taken first; held: one entry a lease
    for _ in range(400):
        event = rng.random()
        if event < 0.4:
            count = rng.randrange(len(blank) + len(cached) + 1)
            expected = (blank + cached)[:count]
            blank, cached = blank[count:], cached[max(0, count - len(blank)) :]
            assert pool.take(count).tolist() == expected
            held += expected
        elif event < 0.55 and cached:
            block = rng.choice(cached)
            pool.share(blocks_of(block))
            cached.remove(block)
            held.append(block)
        elif held:
            released = rng.sample(sorted(set(held)), rng.randrange(1, len(set(held)) + 1))
            for block in released:
                if rng.random() < 0.7 and not index.is_cached(blocks_of(block))[0]:
                    index.register([next_key.to_bytes(16, "big")], blocks_of(block))
                    next_key += 1
            pool.release(blocks_of(*released))
            for block in released:
                held.remove(block)
            free = [block for block in released if block not in held]
            is_cached = dict(zip(free, index.is_cached(blocks_of(*free)).tolist(), strict=True))
            blank = [block for block in free if not is_cached[block]][::-1] + blank
            cached += [block for block in free if is_cached[block]]
        assert pool.num_free == len(blank) + len(cached)
        pool.check_invariants(blocks_of(*held))
