from __future__ import annotations

import numpy as np
import torch

from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import BatchPlan, BlockTableChanges, RowSettings
from toka.runner.device_tables import DeviceTables
from toka.runner.step_buffers import Bucket, StepBuffers

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


def test_fill_pads_to_the_bucket() -> None:
    buffers = StepBuffers(max_tokens=16, max_rows=8, device=CPU)
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
    }


def test_a_smaller_step_leaves_nothing_of_the_larger_before_it() -> None:
    buffers = StepBuffers(max_tokens=16, max_rows=8, device=CPU)
    buffers.fill(plan(), Bucket(16, 8, 8))
    small = BatchPlan(2, int32(1), int32(0, 1), int32(7), int32(1), np.array([True]), no_changes(), settings())
    inputs = buffers.fill(small, Bucket(2, 2, 2))
    assert inputs["token_rows"].tolist() == [1, -1]
    assert inputs["rows"].tolist() == [1, -1]
    assert inputs["query_start"].tolist() == [0, 1, 1]
    assert inputs["sample_rows"].tolist() == [1, -1]


def test_buffers_never_move() -> None:
    buffers = StepBuffers(max_tokens=16, max_rows=8, device=CPU)
    first = buffers.fill(plan(), Bucket(8, 5, 4))
    second = buffers.fill(plan(), Bucket(8, 5, 4))
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)


def test_tables_take_changes_only() -> None:
    tables = DeviceTables(max_rows=6, max_blocks_per_row=4, device=CPU)
    values = tables.values()
    pointers = {name: tensor.data_ptr() for name, tensor in values.items()}
    tables.apply(BlockTableChanges(int32(5, 5, 1), int32(0, 1, 3), int32(7, 8, 9)), settings(5, 1))
    tables.apply(no_changes(), settings())
    assert values["block_table"][5].tolist() == [7, 8, 0, 0]
    assert values["block_table"][1].tolist() == [0, 0, 0, 9]
    assert values["seed"][[5, 1]].tolist() == [2**40, 2**40 + 1]
    assert values["temperature"].tolist() == [0.0, 0.5, 0.0, 0.0, 0.0, 0.5]
    assert {name: tensor.data_ptr() for name, tensor in tables.values().items()} == pointers
