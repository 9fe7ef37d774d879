"""The runner's logic around a step: buckets, captures, launches ahead. The step itself is a stand-in that draws predictable tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from toka.errors import InvariantError
from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES, MAX_LOGPROBS
from toka.plan import Adjusting, AdjustmentSettings, BatchPlan, MaskedDraws, Scoring
from toka.runner.kv_cache import KVCache, KVCacheShape
from toka.runner.model_runner import ModelRunner, RunnerSizes
from toka.runner.step_program import NO_TARGET
from toka.warmup.coverage import buckets, dummy_plan

CPU = torch.device("cpu")
SHAPE = KVCacheShape(num_layers=1, num_kv_heads=1, head_dim=8, block_size=8, dtype=torch.float32)
NUM_BLOCKS = 64


class Doubling:
    """Draws twice the last token of each row and remembers it; writes over its own result every time, as a captured step does."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}
        self.num_runs = 0
        self.asked: list[list[int]] = []
        self.num_masked = self.num_adjusted = 0

    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        self.num_runs += 1
        tokens = inputs["token_ids"].clone()
        rows, index = inputs["draw_rows"], inputs["sample_index"].long()
        before = inputs["last_token"][(-1 - tokens).clamp(min=0).long()]
        drawn = torch.where(rows >= 0, 2 * torch.where(tokens < 0, before, tokens)[index], 0)
        inputs["last_token"][rows[rows >= 0].long()] = drawn[rows >= 0]
        out = self.outputs.setdefault(len(rows), torch.empty(len(rows), dtype=torch.int32))
        return (out.copy_(drawn),)

    def follow_up(self, op: str, values: Mapping[str, Tensor], step: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Draws the first word of each row's mask, and makes logprobs of the ids that are asked for."""
        if op == "adjust_logits":
            self.num_adjusted += 1
            self.adjusted_rows, self.known = values["adjusted_rows"].tolist(), values["token_of_slot"].clone()
            return (torch.zeros(len(values["adjusted_rows"]), 8),)
        if op == "sample":
            self.num_masked += 1
            rows, drawn = values["late_rows"], values["masks"][:, 0][values["mask_of"].clamp(min=0).long()]
            drawn = torch.where(rows >= 0, drawn, 0)
            values["last_token"][rows[rows >= 0].long()] = drawn[rows >= 0]
            return (drawn,)
        self.asked.append(values["scored_ids"].tolist())
        ids = values["scored_ids"]
        top = ids[:, None].expand(-1, MAX_LOGPROBS)
        return -ids.float(), ids, top, -top.float()


def make_runner(max_captured_tokens: int = 0, token_step: int = 0) -> tuple[ModelRunner, Doubling]:
    sizes = RunnerSizes(
        max_tokens=32,
        max_rows=8,
        max_table_rows=16,
        max_blocks_per_row=8,
        vocab_size=8,
        max_captured_tokens=max_captured_tokens,
        token_step=token_step,
    )
    step = Doubling()
    runner = ModelRunner(step, sizes, CPU)  # type: ignore[arg-type]
    runner.attach(KVCache(SHAPE, NUM_BLOCKS, CPU))
    return runner, step


def plan_of(step: int, rows: list[int], token_ids: list[int], samples: list[bool]) -> BatchPlan:
    """One token a row."""
    empty = dummy_plan(make_runner()[0].bucket_for(1, 1), NUM_BLOCKS, 8, sampled=False)
    nothing = np.zeros(0, dtype=np.int32)
    return BatchPlan(
        step=step,
        rows=np.array(rows, dtype=np.int32),
        query_start=np.arange(len(rows) + 1, dtype=np.int32),
        token_ids=np.array(token_ids, dtype=np.int32),
        seq_lens=np.ones(len(rows), dtype=np.int32),
        samples=np.array(samples),
        table=type(empty.table)(nothing, nothing, nothing),
        settings=type(empty.settings)(*[getattr(empty.settings, name)[:0] for name in empty.settings.__slots__]),
    )


@pytest.mark.parametrize("captures", [False, True])
def test_rows_that_draw_nothing_get_nothing(captures: bool) -> None:
    runner, _ = make_runner(32 if captures else 0)
    result = runner.run(plan_of(3, [4, 0, 2], [10, 20, 30], [True, False, True]))
    assert (result.step, result.sampled.tolist()) == (3, [20, 0, 60])


@pytest.mark.parametrize("captures", [False, True])
def test_logprobs_follow_a_step_only_if_somebody_asks(captures: bool) -> None:
    """Of the drawn token that asks and of the token that follows a place in a prompt; the drawn one's id is known to the device only."""
    runner, step = make_runner(32 if captures else 0)
    plain = plan_of(0, [4, 0, 2], [10, 20, 30], [True, False, True])
    if captures:
        bucket = runner.bucket_for(3, 3)
        runner.capture(dummy_plan(bucket, NUM_BLOCKS, 8, sampled=True), bucket)
    assert runner.run(plain).logprobs is None and step.asked == []
    scoring = Scoring(np.array([False, True]), np.array([1], dtype=np.int32), np.array([7], dtype=np.int32))
    result = runner.run(dataclasses.replace(plain, scoring=scoring))
    assert result.sampled.tolist() == [20, 0, 60]
    assert step.asked[0][:3] == [NO_TARGET, 60, 7] and set(step.asked[0][3:]) <= {NO_TARGET}
    assert result.logprobs is not None
    assert result.logprobs.logprobs[1:].tolist() == [-60.0, -7.0] and result.logprobs.ranks[1:].tolist() == [60, 7]
    assert result.logprobs.top_ids.shape == result.logprobs.top_logprobs.shape == (3, MAX_LOGPROBS)


@pytest.mark.parametrize("captures", [False, True])
def test_masked_rows_draw_behind_the_graph_and_others_within_it(captures: bool) -> None:
    """Row 4 alone is masked; the next step and the logprobs know what it drew."""
    runner, step = make_runner(32 if captures else 0)
    if captures:
        for bucket in buckets(runner):
            runner.capture(dummy_plan(bucket, NUM_BLOCKS, 8, sampled=True), bucket)
    masked = MaskedDraws(np.array([False, True]), np.array([77], dtype=np.int64))
    scoring = Scoring(np.array([True, True]), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))
    plan = plan_of(0, [2, 0, 4], [10, 20, 30], [True, False, True])
    begun = runner.begin(dataclasses.replace(plan, masked=masked, scoring=scoring))
    assert step.num_masked == 0
    result = runner.finish(begun, np.array([[5]], dtype=np.int32)).result()
    assert result.sampled.tolist() == [20, 0, 5] and step.asked[-1][:2] == [20, 5]
    second = runner.run(plan_of(1, [2, 4], [-1 - 2, -1 - 4], [True, True]))
    assert second.sampled.tolist() == [40, 10] and step.num_masked == 1


def test_adjusted_rows_draw_late_once_their_tokens_are_known() -> None:
    """Row 4 alone is adjusted; its newest token is known to the device only. Row 2 draws within the graph."""
    runner, step = make_runner()
    first = plan_of(0, [2, 4], [10, 30], [True, True])
    blocks = np.array([3, 5], dtype=np.int32)
    table = type(first.table)(np.array([2, 4], dtype=np.int32), np.zeros(2, dtype=np.int32), blocks)
    settings = AdjustmentSettings(
        rows=np.array([4], dtype=np.int32),
        num_prompt_tokens=np.array([9], dtype=np.int32),
        penalties=np.array([[0.5, 1.0, 2.0]], dtype=np.float32),
        bias_ids=np.full((1, MAX_LOGIT_BIASES), -1, dtype=np.int32),
        biases=np.zeros((1, MAX_LOGIT_BIASES), dtype=np.float32),
        bad_words=np.full((1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, dtype=np.int32),
        cached_slots=np.array([82, 81], dtype=np.int64),
        cached_tokens=np.array([7, 6], dtype=np.int32),
    )
    adjusting = Adjusting(np.array([False, True]), np.array([1], dtype=np.int32), settings)
    assert runner.run(dataclasses.replace(first, table=table, adjusting=adjusting)).sampled.tolist() == [20, 0]
    assert step.adjusted_rows[:2] == [-1, 4] and (step.num_adjusted, step.num_masked) == (1, 1)
    assert [int(step.known[slot]) for slot in (24, 80, 81, 82)] == [0, 30, 6, 7]  # blocks of 16
    tables = runner._adjustments.values()
    assert tables["penalties"][4].tolist() == [0.5, 1.0, 2.0] and int(tables["num_prompt_tokens"][4]) == 9

    runner._buffers._tables.values()["last_token"][4] = 44
    second = plan_of(1, [2, 4], [-1 - 2, -1 - 4], [True, True])
    second = dataclasses.replace(second, seq_lens=np.array([2, 2], dtype=np.int32))
    runner.run(dataclasses.replace(second, adjusting=dataclasses.replace(adjusting, settings=None)))
    assert int(step.known[81]) == 44
    runner.run(dataclasses.replace(second, step=2))
    assert (step.num_adjusted, step.num_masked) == (2, 2)


def test_a_step_with_masked_draws_needs_masks() -> None:
    runner, _ = make_runner()
    masked = MaskedDraws(np.array([True]), np.array([77], dtype=np.int64))
    with pytest.raises(InvariantError, match="got no masks"):
        runner.run(dataclasses.replace(plan_of(0, [2], [10], [True]), masked=masked))


@pytest.mark.parametrize("captures", [False, True])
def test_the_next_step_takes_tokens_that_were_never_read_back(captures: bool) -> None:
    runner, _ = make_runner(32 if captures else 0)
    if captures:
        for bucket in buckets(runner):
            runner.capture(dummy_plan(bucket, NUM_BLOCKS, 8, sampled=True), bucket)
    first = runner.run(plan_of(0, [4, 2], [10, 30], [True, True]))
    second = runner.run(plan_of(1, [2, 4], [-1 - 2, -1 - 4], [True, True]))
    assert (first.sampled.tolist(), second.sampled.tolist()) == ([20, 60], [120, 40])


def test_a_captured_size_is_replayed_with_all_its_rows_and_others_as_they_come() -> None:
    runner, step = make_runner(max_captured_tokens=8)
    assert runner.bucket_for(5, 1).num_samples == 5  # the graph draws for every row that may be there
    assert runner.bucket_for(20, 3).num_samples == 3
    every = list(buckets(runner))
    assert {bucket.num_tokens for bucket in every} == set(runner.token_sizes)
    captured = [bucket for bucket in every if bucket.num_tokens <= 8]
    assert captured == every[-len(captured) :] and [bucket.num_tokens for bucket in captured] == list(range(8, 0, -1))
    assert runner.sizes.num_captured == 8
    for bucket in captured:
        runner.capture(dummy_plan(bucket, NUM_BLOCKS, 8, sampled=False), bucket)
    assert step.num_runs == 8  # once each: what only happens the first time has happened
    assert runner.run(plan_of(0, [1, 2, 3], [1, 2, 3], [True, False, True])).sampled.tolist() == [2, 0, 6]


def test_another_cache_needs_other_captures() -> None:
    runner, _ = make_runner(max_captured_tokens=32)
    bucket = runner.bucket_for(4, 4)
    runner.capture(dummy_plan(bucket, NUM_BLOCKS, 8, sampled=False), bucket)
    assert runner._captured
    runner.attach(KVCache(SHAPE, NUM_BLOCKS, CPU))
    assert not runner._captured


@pytest.mark.parametrize(
    ("step", "expected"), [(0, (1, 2, 3, 4)), (4, (1, 2, 4, 8)), (16, (1, 2, 4, 8, 16, 32)), (5, (1, 2, 4, 5, 10, 15))]
)
def test_the_distance_of_sizes_can_be_chosen(step: int, expected: tuple[int, ...]) -> None:
    sizes = make_runner(token_step=step)[0].token_sizes
    assert sizes[: len(expected)] == expected and sizes[-1] == 32
