from __future__ import annotations

import random

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.shared_prefix import SharedPrefixes


def ids(*numbers: int) -> I32:
    return np.array(numbers, dtype=np.int32)


def test_a_prefix_that_two_share_goes_back_with_the_later_one() -> None:
    shared = SharedPrefixes(num_blocks=8, max_rows=4)
    shared.take(0, ids(0, 1, 2))
    shared.join(1, ids(0, 1), np.ones(2, dtype=np.bool_))
    assert shared.num_shared_blocks.tolist() == [2, 2, 0, 0]
    release_of_row = np.array([5, 9, 0, 0])
    num_blocks, release = shared.releases(release_of_row)
    assert (num_blocks.tolist(), release.tolist()) == ([2], [9])
    assert shared.release_of(ids(1, 2), release_of_row).tolist() == [9, 5]


def test_who_shares_less_splits_the_run() -> None:
    shared = SharedPrefixes(num_blocks=8, max_rows=4)
    shared.take(0, ids(0, 1, 2))
    for row, num_blocks in ((1, 3), (2, 1)):
        shared.join(row, np.arange(num_blocks, dtype=np.int32), np.ones(num_blocks, dtype=np.bool_))
    num_blocks, release = shared.releases(np.array([1, 2, 3, 0]))
    assert sorted(zip(num_blocks.tolist(), release.tolist(), strict=True)) == [(1, 3), (2, 2)]
    shared.leave(1)
    assert shared.releases(np.array([1, 2, 3, 0]))[1].tolist() == [1, 3]


@pytest.mark.parametrize("seed", range(4))
def test_it_knows_what_rows_hold_whatever_they_share(seed: int) -> None:
    rng = random.Random(seed)
    shared, held_by, next_block = SharedPrefixes(num_blocks=4000, max_rows=8), {}, 0
    for _ in range(300):
        row = rng.randrange(8)
        if row in held_by:
            shared.leave(row)
            del held_by[row]
        else:
            prefix = held_by[rng.choice(list(held_by))] if held_by else ids()
            prefix = prefix[: rng.randrange(len(prefix) + 1)]
            if held_by and rng.random() < 0.3:  # blocks of one prefix, found with different rows
                more = held_by[rng.choice(list(held_by))]
                prefix = np.concatenate((prefix, more[~np.isin(more, prefix)][:2]))
            own = np.arange(next_block, next_block + rng.randrange(1, 4), dtype=np.int32)
            next_block += len(own)
            shared.join(row, prefix, np.ones(len(prefix), dtype=np.bool_))
            shared.take(row, own)
            held_by[row] = np.concatenate((prefix, own))
        rows = sorted(held_by)
        shared.check_invariants(rows, [held_by[r] for r in rows])
        release_of_row = np.array([rng.randrange(50) for _ in range(8)])
        for r in rows:
            expected = [max(release_of_row[o] for o in rows if block in held_by[o]) for block in held_by[r]]
            assert shared.release_of(held_by[r], release_of_row).tolist() == expected


def test_a_block_with_another_holder_than_known_is_noticed() -> None:
    shared = SharedPrefixes(num_blocks=8, max_rows=4)
    shared.take(0, ids(0))
    with pytest.raises(InvariantError, match="held by rows"):
        shared.check_invariants([1], [ids(0)])
