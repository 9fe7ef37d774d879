from __future__ import annotations

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.messages import FinishReason
from toka.params import SamplingParams
from toka.scheduler.block_pool import BlockPool
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.prefix_index import KeyChain, PrefixIndex
from toka.scheduler.request import Draining, Finished, Rank, Request, Running, Waiting
from toka.scheduler.request_table import RequestTable

PROMPT = np.arange(6, dtype=np.int32)


class Room:
    """A table and a pool with one running request that holds two blocks and has drawn one token."""

    def __init__(self) -> None:
        config = SchedulerConfig(num_blocks=4, block_size=4, max_request_tokens=16)
        self.table = RequestTable(config)
        self.pool = BlockPool(4, PrefixIndex(4))
        request = Request(
            request_id=1,
            rank=Rank(0, 0.0, 0),
            sampling=SamplingParams(),
            stop_token_ids=(),
            seed=0,
            num_prompt_tokens=6,
            max_total_tokens=16,
            chain=KeyChain(b"", "", 4),
        )
        self.waiting = Waiting(request, PROMPT)
        row = self.table.take_row()
        self.table.request_id[row] = 1
        self.table.tokens[row, :7] = np.arange(7)
        self.table.num_tokens[row] = 7
        rows = np.array([row])
        for block in self.pool.take(2):
            self.table.append_blocks(rows, np.array([block]))
        self.running = self.waiting.admit(row)


def test_settle_gives_row_and_blocks_back_and_ends_the_request() -> None:
    room = Room()
    draining = room.running.finish(FinishReason.STOP, last_step=3)
    assert room.pool.num_free == 2
    assert draining.settle(3, room.table, room.pool) == Finished(1, FinishReason.STOP)
    assert room.pool.num_free == 4 and not len(room.table.live_rows())


def test_preempted_waits_again_with_its_tokens() -> None:
    room = Room()
    after = room.running.preempt(last_step=3).settle(4, room.table, room.pool)
    assert isinstance(after, Waiting) and after.tokens.tolist() == list(range(7))
    room.table.tokens[:] = -5
    assert after.tokens.tolist() == list(range(7)), "the tokens must not be those of the row's next owner"


def test_preempted_may_still_finish() -> None:
    room = Room()
    draining = room.running.preempt(last_step=3).finish(FinishReason.ABORT)
    assert draining.settle(3, room.table, room.pool) == Finished(1, FinishReason.ABORT)


def test_nothing_settles_while_a_step_in_flight_touches_it() -> None:
    room = Room()
    draining = room.running.preempt(last_step=3)
    with pytest.raises(InvariantError, match="in flight"):
        draining.settle(2, room.table, room.pool)
    draining.settle(3, room.table, room.pool)


def test_every_state_is_consumed_by_its_transition() -> None:
    room = Room()
    draining = room.running.preempt(last_step=0)
    for use in (
        lambda: room.waiting.admit(0),
        lambda: room.waiting.abort(),
        lambda: room.running.preempt(last_step=0),
        lambda: room.running.request,
    ):
        with pytest.raises(InvariantError, match="after its transition"):
            use()
    draining.settle(0, room.table, room.pool)
    with pytest.raises(InvariantError, match="after its transition"):
        draining.settle(0, room.table, room.pool)
    assert room.waiting.is_consumed and room.running.is_consumed and draining.is_consumed


def test_only_settle_gives_blocks_back() -> None:
    for state in (Waiting, Running, Draining):
        assert hasattr(state, "settle") == (state is Draining)


def test_a_row_given_up_twice_is_an_error() -> None:
    room = Room()
    room.running.preempt(last_step=0).settle(0, room.table, room.pool)
    with pytest.raises(InvariantError, match="twice"):
        room.table.give_up_row(0)
