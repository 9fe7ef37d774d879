from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import BatchPlan, BlockTableChanges, MaskedDraws, RowSettings, Scoring, SharedPrefixPlan
from toka.runner.device_tables import DeviceTables
from toka.runner.step_buffers import Bucket, StepBuffers
from toka.runner.step_program import DRAWN_TARGET, NO_TARGET

CPU = torch.device("cpu")


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def settings(*rows: int) -> RowSettings:
    count = len(rows)
    return RowSettings(
        rows=int32(*rows),
        temperature=np.full(count, 0.5, np.float32),
        top_k=int32(*range(count)),
        top_p=np.full(count, 0.9, np.float32),
        min_p=np.full(count, 0.1, np.float32),
        seed=np.arange(count, dtype=np.int64) + 2**40,
        held_back_ids=np.full((count, MAX_STOP_TOKEN_IDS), -1, np.int32),
        held_back_until=int32(*range(count)),
    )


def no_changes() -> BlockTableChanges:
    return BlockTableChanges(int32(), int32(), int32())


def plan() -> BatchPlan:
    """Row 5 goes on with a prompt (3 tokens from position 4), row 2 decodes at position 9, row 0 begins with 2 tokens of a prompt."""
    return BatchPlan(
        step=1,
        rows=int32(5, 2, 0),
        query_start=int32(0, 3, 4, 6),
        token_ids=int32(11, 12, 13, -3, 21, 22),
        seq_lens=int32(7, 10, 2),
        samples=np.array([True, True, False]),
        table=no_changes(),
        settings=settings(),
    )


def device_tables(max_blocks: int = 24, max_settings: int = 8) -> DeviceTables:
    return DeviceTables(6, 4, CPU, max_blocks=max_blocks, max_settings=max_settings)


def step_buffers() -> StepBuffers:
    return StepBuffers(16, 8, device_tables(), CPU)


def test_fill_pads_to_the_bucket() -> None:
    buffers = step_buffers()
    inputs = {name: tensor.tolist() for name, tensor in buffers.fill(plan(), Bucket(8, 5, 4)).items()}
    assert inputs == {
        "token_ids": [11, 12, 13, -3, 21, 22, 0, 0],
        "token_rows": [5, 5, 5, 2, 0, 0, -1, -1],
        "positions": [4, 5, 6, 9, 0, 1, 0, 0],
        "rows": [5, 2, 0, -1, -1],
        "seq_lens": [7, 10, 2, 0, 0],
        "query_start": [0, 3, 4, 6, 6, 6],
        "sample_index": [2, 3, 0, 0],
        "sample_rows": [5, 2, -1, -1],
        "sample_seq_lens": [7, 10, 0, 0],
        "sample_query_start": [0, 1, 2, 2, 2],
        "draw_rows": [5, 2, -1, -1],
        "sample_targets": [0, 0, 0, 0],  # nobody asks, nobody reads them
        "late_rows": [0, 0, 0, 0],  # nor these
        "mask_of": [0, 0, 0, 0],
        "adjusted_rows": [0, 0, 0, 0],
        "shared_groups": [[0, 0, 0, 0, 0]],
        "shared_members": [0],
        "shared_lens": [0] * 8,
    }


def test_tokens_of_prompts_are_scored_behind_those_that_are_drawn() -> None:
    """Of row 2's token (which asks; row 5 does not) and, behind them, of row 5's first token and both of row 0's prompt."""
    scoring = Scoring(drawn=np.array([False, True]), places=int32(0, 4, 5), targets=int32(12, 22, 23))
    asked = dataclasses.replace(plan(), scoring=scoring)
    assert (plan().num_samples, asked.num_samples) == (2, 5)
    filled = step_buffers().fill(asked, Bucket(8, 5, 6))
    inputs = {name: tensor.tolist() for name, tensor in filled.items() if "sample" in name or name == "draw_rows"}
    assert inputs == {
        "sample_index": [2, 3, 0, 4, 5, 0],
        "sample_rows": [5, 2, 5, 0, 0, -1],
        "sample_seq_lens": [7, 10, 5, 1, 2, 0],
        "sample_query_start": [0, 1, 2, 3, 4, 5, 5],
        "draw_rows": [5, 2, -1, -1, -1, -1],
        "sample_targets": [NO_TARGET, DRAWN_TARGET, 12, 22, 23, NO_TARGET],
    }


def test_a_smaller_step_leaves_nothing_of_the_larger_before_it() -> None:
    buffers = step_buffers()
    buffers.fill(plan(), Bucket(16, 8, 8))
    small = BatchPlan(2, int32(1), int32(0, 1), int32(7), int32(1), np.array([True]), no_changes(), settings())
    inputs = buffers.fill(small, Bucket(2, 2, 2))
    assert inputs["token_rows"].tolist() == [1, -1]
    assert inputs["rows"].tolist() == [1, -1]
    assert inputs["query_start"].tolist() == [0, 1, 1]
    assert inputs["sample_rows"].tolist() == [1, -1]


def test_groups_of_shared_prefixes_come_with_their_step_only() -> None:
    buffers = StepBuffers(16, 8, device_tables(), CPU, max_shared_groups=2, max_shared_members=6)
    shared = SharedPrefixPlan(
        groups=np.array([[0, 0, 2, 0, 64], [1, 2, 4, 64, 128]], dtype=np.int32),
        members=int32(0, 1, 0, 1),
        lens=int32(128, 128),
    )
    with_groups = buffers.fill(dataclasses.replace(plan(), shared=shared), Bucket(8, 5, 4))
    assert with_groups["shared_groups"].tolist() == [[0, 0, 2, 0, 64], [1, 2, 4, 64, 128], [0] * 5]
    assert with_groups["shared_members"].tolist()[:4] == [0, 1, 0, 1]
    assert with_groups["shared_lens"].tolist() == [128, 128, 0, 0, 0, 0, 0, 0]
    without = buffers.fill(plan(), Bucket(8, 5, 4))
    assert without["shared_groups"].tolist()[0] == [0] * 5 and not any(without["shared_lens"].tolist())


def test_buffers_never_move() -> None:
    buffers = step_buffers()
    first = buffers.fill(plan(), Bucket(8, 5, 4))
    second = buffers.fill(plan(), Bucket(8, 5, 4))
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


def test_tables_take_changes_only() -> None:
    tables = device_tables()
    buffers = StepBuffers(16, 8, tables, CPU)
    values = tables.values()
    pointers = {name: tensor.data_ptr() for name, tensor in values.items()}
    changes = BlockTableChanges(int32(5, 5, 1), int32(0, 1, 3), int32(7, 8, 9))
    buffers.fill(dataclasses.replace(plan(), table=changes, settings=settings(5, 1)), Bucket(8, 5, 4))
    buffers.fill(plan(), Bucket(8, 5, 4))
    assert values["block_table"][5].tolist() == [7, 8, 0, 0]
    assert values["block_table"][1].tolist() == [0, 0, 0, 9]
    assert values["seed"][[5, 1]].tolist() == [2**40, 2**40 + 1]
    assert values["temperature"].tolist() == [0.0, 0.5, 0.0, 0.0, 0.0, 0.5]
    assert {name: tensor.data_ptr() for name, tensor in tables.values().items()} == pointers


@pytest.mark.parametrize(("max_blocks", "max_settings"), [(1, 1), (2, 8), (24, 1)])
def test_more_changes_than_come_in_one_copy_all_arrive(max_blocks: int, max_settings: int) -> None:
    rows, columns = np.divmod(np.arange(24, dtype=np.int32), 4)
    changes = BlockTableChanges(rows, columns, np.arange(100, 124, dtype=np.int32))
    given = dataclasses.replace(plan(), table=changes, settings=settings(4, 0, 5))
    values, inputs = [], []
    for tables in (device_tables(), device_tables(max_blocks, max_settings)):
        filled = StepBuffers(16, 8, tables, CPU).fill(given, Bucket(8, 5, 4))
        inputs.append({name: tensor.tolist() for name, tensor in filled.items()})
        values.append({name: tensor.tolist() for name, tensor in tables.values().items()})
    assert values[0] == values[1] and inputs[0] == inputs[1]
    assert values[1]["block_table"] == np.arange(100, 124).reshape(6, 4).tolist()
    assert values[1]["seed"] == [2**40 + 1, 0, 0, 0, 2**40, 2**40 + 2]


def test_masked_draws_are_taken_out_of_the_others() -> None:
    masked = dataclasses.replace(plan(), masked=MaskedDraws(np.array([False, True]), np.array([7], dtype=np.int64)))
    inputs = {name: tensor.tolist() for name, tensor in step_buffers().fill(masked, Bucket(8, 5, 4)).items()}
    assert inputs["draw_rows"] == [5, -1, -1, -1]
    assert inputs["late_rows"] == [-1, 2, -1, -1] and inputs["mask_of"] == [-1, 0, -1, -1]
    assert inputs["sample_rows"] == [5, 2, -1, -1] and inputs["sample_index"] == [2, 3, 0, 0]
