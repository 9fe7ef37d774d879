from __future__ import annotations

import numpy as np
import pytest

from toka.errors import InvariantError
from toka.scheduler.config import SchedulerConfig
from toka.scheduler.request_table import MAX_STOP_IDS_PER_ROW, RequestTable


@pytest.fixture
def table() -> RequestTable:
    return RequestTable(SchedulerConfig(num_blocks=8, block_size=4, max_request_tokens=30, max_seqs_per_forward=3))


def own(table: RequestTable) -> int:
    row = table.take_row()
    table.request_id[row] = 100 + row
    return row


def test_a_row_changes_generation_with_its_owner_and_when_results_stop_being_wanted(table: RequestTable) -> None:
    assert own(table) == 0
    generations = [int(table.generation[0])]
    table.drop_late_results(0)
    generations.append(int(table.generation[0]))
    table.give_up_row(0)
    assert own(table) == 0
    generations.append(int(table.generation[0]))
    assert len(set(generations)) == 3 and table.epoch == 2


def test_tokens_and_blocks_are_appended_per_row(table: RequestTable) -> None:
    rows = np.array([own(table), own(table)])
    assert table.append_blocks(rows, np.array([5, 6], dtype=np.int32)).tolist() == [0, 0]
    assert table.append_blocks(rows[1:], np.array([7], dtype=np.int32)).tolist() == [1]
    assert table.append_tokens(rows, np.array([11, 12], dtype=np.int32)).tolist() == [1, 1]
    assert table.append_tokens(rows[1:], np.array([13], dtype=np.int32)).tolist() == [2]
    assert [table.blocks_of(row).tolist() for row in (0, 1)] == [[5], [6, 7]]
    assert [table.tokens_of(row).tolist() for row in (0, 1)] == [[11], [12, 13]]
    assert table.token_room[:2].tolist() == [4, 8]


def test_block_contents_are_the_token_ids_of_whole_blocks(table: RequestTable) -> None:
    table.tokens[1, :8] = np.arange(8)
    contents = table.block_contents(np.array([1, 1]), np.array([1, 0], dtype=np.int32))
    assert np.frombuffer(contents, dtype=np.int32).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


def test_stop_ids_are_those_of_the_rows_owner(table: RequestTable) -> None:
    rows = np.array([own(table), own(table)])
    table.set_stop_ids(0, (5,))
    table.set_stop_ids(1, tuple(range(10, 10 + MAX_STOP_IDS_PER_ROW)))
    last = 9 + MAX_STOP_IDS_PER_ROW
    assert table.is_stop(rows, np.array([5, last], dtype=np.int32)).tolist() == [True, True]
    assert table.is_stop(rows, np.array([10, 5], dtype=np.int32)).tolist() == [False, False]
    table.give_up_row(1)
    assert own(table) == 1
    assert table.is_stop(rows, np.array([5, last], dtype=np.int32)).tolist() == [True, False]


def test_rank_is_priority_then_arrival(table: RequestTable) -> None:
    table.priority[:3] = (1, 0, 0)
    table.arrival[:3] = (0, 2, 1)
    assert table.by_rank(np.arange(3)).tolist() == [2, 1, 0]


def test_check_notices_a_row_without_owner(table: RequestTable) -> None:
    table.take_row()
    with pytest.raises(InvariantError):
        table.check_invariants()
