from __future__ import annotations

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.plan import I32
from toka.scheduler.batching import Filled
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.prefix_index import KeyChain, PrefixIndex
from toka.scheduler.prefix_registrar import PrefixRegistrar
from toka.scheduler.request_table import RequestTable

BLOCK_SIZE = 4


class Room:
    """Four rows with nothing in the index; row r owns blocks 4 r .. 4 r + 3."""

    def __init__(self, *, enabled: bool = True) -> None:
        config = SchedulerConfig(num_blocks=16, block_size=BLOCK_SIZE, max_request_tokens=17, max_seqs_per_forward=2)
        self.table, self.index = RequestTable(config), PrefixIndex(16)
        self.registrar = PrefixRegistrar(self.table, self.index, enabled=enabled)
        self.table.blocks[:4] = np.arange(16).reshape(4, 4)
        self.table.tokens[:4, :16] = np.arange(64).reshape(4, 16)
        for row in range(4):
            self.registrar.take_row(row, KeyChain(b"secret", "", BLOCK_SIZE), 0)

    def advance(self, row: int, num_tokens: int) -> None:
        self.table.num_tokens[row], self.table.num_computed_tokens[row] = num_tokens + 1, num_tokens

    def filled(self, rows: list[int], places: list[int]) -> Filled:
        held = np.array(rows, dtype=np.intp)
        return Filled(held, np.array(places, dtype=np.int32), self.table.generation[held])

    def known(self, row: int) -> list[int]:
        chain = KeyChain(b"secret", "", BLOCK_SIZE)
        chain.extend(self.table.tokens[row], 4)
        blocks: I32 = self.index.longest_prefix(chain, 4)
        return blocks.tolist()


def test_offer_makes_full_blocks_known_once() -> None:
    room = Room()
    room.advance(1, 11)
    for _ in range(2):
        room.registrar.offer(1)
    assert room.known(1) == [4, 5] and len(room.index) == 2


def test_only_what_is_both_known_and_computed_is_full() -> None:
    room = Room()
    for row, (num_tokens, num_computed) in enumerate([(8, 7), (9, 8), (7, 8)]):
        room.table.num_tokens[row], room.table.num_computed_tokens[row] = num_tokens, num_computed
        room.registrar.offer(row)
    assert [len(room.known(row)) for row in range(3)] == [1, 2, 1]


def test_filled_blocks_are_offered_a_few_a_step() -> None:
    room = Room()
    for row in range(4):
        room.advance(row, 4)
    room.registrar.offer_filled(room.filled([0, 1, 2, 3], [0, 0, 0, 0]), num_rows=4)  # 1 + 4 // 4
    assert [room.known(row) for row in range(4)] == [[0], [4], [], []]
    room.registrar.offer_filled(room.filled([], []), num_rows=4)
    assert [room.known(row) for row in range(4)] == [[0], [4], [8], [12]]


def test_two_blocks_of_one_row_go_in_turn() -> None:
    room = Room()
    room.advance(0, 8)
    room.registrar.offer_filled(room.filled([0, 0], [0, 1]), num_rows=4)
    assert room.known(0) == [0, 1]


def test_a_gap_is_an_error() -> None:
    room = Room()
    room.advance(0, 8)
    with pytest.raises(InvariantError, match="block 1 after 0"):
        room.registrar.offer_filled(room.filled([0], [1]), num_rows=4)


def test_a_row_given_up_is_offered_a_last_time_and_then_passed_over() -> None:
    room = Room()
    for row in range(3):
        room.advance(row, 8)
    room.registrar.offer_filled(room.filled([1, 0, 0], [0, 0, 1]), num_rows=1)  # the first only
    room.registrar.give_up_row(0)
    assert room.known(0) == [0, 1]
    room.table.drop_late_results(0)  # as when a row is given up
    room.registrar.take_row(0, KeyChain(b"secret", "another", BLOCK_SIZE), 0)
    room.registrar.offer_filled(room.filled([], []), num_rows=8)
    assert len(room.index) == 3


def test_a_block_whose_last_tokens_were_dropped_is_passed_over() -> None:
    """The row stopped after the step was planned: later results were not taken in, so the block's ids are not known."""
    room = Room()
    room.advance(0, 4)
    filled = room.filled([0], [0])
    room.table.num_tokens[0] = 3
    room.table.drop_late_results(0)
    room.registrar.offer_filled(filled, num_rows=4)
    room.registrar.give_up_row(0)
    assert len(room.index) == 0


def test_a_row_without_owner_offers_nothing() -> None:
    room = Room()
    room.registrar.give_up_row(0)
    with pytest.raises(InvariantError, match="no owner"):
        room.registrar.offer(0)


def test_disabled_it_offers_nothing() -> None:
    room = Room(enabled=False)
    room.advance(0, 8)
    room.registrar.offer(0)
    room.registrar.offer_filled(room.filled([0], [0]), num_rows=4)
    room.registrar.give_up_row(0)
    assert len(room.index) == 0
