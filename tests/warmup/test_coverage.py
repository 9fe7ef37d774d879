from __future__ import annotations

import pytest
import torch

from toka.runner.model_runner import ModelRunner, RunnerSizes
from toka.runner.step_buffers import Bucket
from toka.warmup.coverage import buckets, dummy_plan


def runner(max_tokens: int, max_rows: int) -> ModelRunner:
    sizes = RunnerSizes(max_tokens=max_tokens, max_rows=max_rows, max_table_rows=2 * max_rows, max_blocks_per_row=64)
    return ModelRunner(None, sizes, torch.device("cpu"))  # type: ignore[arg-type]  # nothing is run


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(1, 1), (7, 7), (64, 8), (512, 64), (100, 100)])
def test_every_size_that_serving_can_meet_is_warmed(max_tokens: int, max_rows: int) -> None:
    it = runner(max_tokens, max_rows)
    warmed = list(buckets(it))
    assert warmed[0].num_tokens == max_tokens
    tokens, samples = {bucket.num_tokens for bucket in warmed}, {bucket.num_samples for bucket in warmed}
    for num_tokens in range(1, max_tokens + 1):
        for num_samples in range(min(num_tokens, max_rows) + 1):
            bucket = it.bucket_for(num_tokens, num_samples)
            assert bucket.num_tokens in tokens and bucket.num_samples in samples
            assert bucket.num_tokens >= num_tokens and bucket.num_samples >= num_samples
            assert bucket.num_rows >= min(num_tokens, max_rows)


@pytest.mark.parametrize("bucket", [Bucket(1, 1, 1), Bucket(13, 5, 3), Bucket(64, 8, 8)])
@pytest.mark.parametrize("sampled", [True, False])
def test_dummy_plans_are_lawful(bucket: Bucket, sampled: bool) -> None:
    plan = dummy_plan(bucket, num_blocks=40, block_size=8, sampled=sampled)
    assert plan.num_tokens == bucket.num_tokens and plan.num_rows == bucket.num_rows
    assert (plan.query_start[1:] > plan.query_start[:-1]).all()
    assert plan.positions().min() == 0
    assert plan.table.blocks.max() < 40
    owned = {(row, column) for row, column in zip(plan.table.rows.tolist(), plan.table.columns.tolist(), strict=True)}
    needed = {(row, pos // 8) for row, pos in zip(plan.token_rows().tolist(), plan.positions().tolist(), strict=True)}
    assert needed <= owned
