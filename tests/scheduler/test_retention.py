from __future__ import annotations

import random

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.retention import COMES_BACK, LONG_PREFIX_TOKENS, ORDINARY, RetentionQueues, worth_of


def blocks_of(*numbers: int) -> I32:
    return np.array(numbers, dtype=np.int32)


def test_worth_grows_with_the_prefix_and_with_the_chance_that_it_comes_back() -> None:
    lengths = (1, LONG_PREFIX_TOKENS[0] - 1, LONG_PREFIX_TOKENS[0], LONG_PREFIX_TOKENS[1], 10**6)
    once = [worth_of(comes_back=False, num_tokens=length) for length in lengths]
    again = [worth_of(comes_back=True, num_tokens=length) for length in lengths]
    assert once == [0, 0, 1, 2, 2]
    assert again == [worth + COMES_BACK for worth in once]


def test_a_conversation_outlives_seven_turns_of_the_pool_and_not_eight() -> None:
    num_blocks = 10
    queues = RetentionQueues(num_blocks)
    queues.raise_worth(blocks_of(9), COMES_BACK)
    queues.put(blocks_of(9))
    queues.put(blocks_of(8))
    num_freed = 2
    while (gone := int(queues.pop(1)[0])) != 9:  # a stream of ordinary blocks through the rest of the pool
        queues.put(blocks_of(gone))
        num_freed += 1
    assert 7 * num_blocks < num_freed <= 8 * num_blocks


@pytest.mark.parametrize("seed", range(20))
def test_order_equals_that_of_a_plain_sort(seed: int) -> None:
    """Against a list of (due, block), over enough turns that the queues are squeezed many times."""
    rng = random.Random(seed)
    num_blocks = rng.choice([1, 3, 16])
    queues = RetentionQueues(num_blocks)
    held = list(range(num_blocks))
    worths = [ORDINARY] * num_blocks
    queued: list[tuple[int, int]] = []
    num_freed = 0
    for _ in range(500):
        event = rng.random()
        if event < 0.5 and held:
            put = rng.sample(held, rng.randrange(1, len(held) + 1))
            raised = rng.sample(put, rng.randrange(len(put) + 1))
            worth = rng.choice([0, 0, 1, 2, 4])
            queues.raise_worth(blocks_of(*raised), worth)
            for block in raised:
                worths[block] = max(worths[block], worth)
            queues.put(blocks_of(*put))
            for block in put:
                queued.append((num_freed + (2 ** worths[block] - 1) * num_blocks, block))
                num_freed += 1
                held.remove(block)
        elif event < 0.7 and queued:
            removed = rng.sample(queued, rng.randrange(1, len(queued) + 1))
            queues.remove(blocks_of(*(block for _, block in removed)))
            for entry in removed:
                queued.remove(entry)
                held.append(entry[1])
        elif queued:
            due_of = {block: due for due, block in queued}
            count = rng.randrange(1, len(queued) + 1)
            popped = queues.pop(count).tolist()
            assert [due_of.pop(block) for block in popped] == sorted(due for due, _ in queued)[:count]
            queued = [(due, block) for block, due in due_of.items()]
            held += popped
            for block in popped:
                worths[block] = ORDINARY
        assert len(queues) == len(queued)
        assert sorted(queues.queued().tolist()) == sorted(block for _, block in queued)


def test_a_block_that_is_not_here_cannot_be_taken_out() -> None:
    queues = RetentionQueues(2)
    queues.put(blocks_of(1))
    with pytest.raises(InvariantError, match="without content"):
        queues.remove(blocks_of(1, 0))
