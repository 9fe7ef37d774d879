"""Every bucket that serving can reach, as plans that exercise it (floor 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from toka.plan import (
    SHARED_PREFIX_STEP,
    Adjusting,
    AdjustmentSettings,
    BatchPlan,
    BlockTableChanges,
    MaskedDraws,
    RowSettings,
    Scoring,
    SharedPrefixPlan,
    TokenMasks,
)
from toka.runner.model_runner import ModelRunner
from toka.runner.step_buffers import Bucket
from toka.runner.step_program import num_mask_words

_NO_I32 = np.empty(0, dtype=np.int32)


def buckets(runner: ModelRunner) -> Iterator[Bucket]:
    """All buckets whose parts serving can meet, largest first; those that are captured whole come last.

    Of the others each size of either ladder is met, not each pair: only the last region knows the samples. After the largest step come
    all numbers of tokens without samples, for which the last region is left out, and then all numbers of samples with few tokens.
    """
    max_rows, largest_captured = runner.sizes.max_rows, runner.sizes.max_captured_tokens
    tokens = [size for size in runner.token_sizes[::-1] if size > largest_captured]
    if tokens:
        largest, *smaller = runner.sample_sizes[::-1]
        yield Bucket(tokens[0], min(tokens[0], max_rows), largest)
        yield from (Bucket(size, min(size, max_rows), 0) for size in tokens[1:])
        for samples in smaller:
            size = next(size for size in reversed(tokens) if size >= samples)
            yield Bucket(size, min(size, max_rows), samples)
    for size in runner.token_sizes[::-1]:
        if size <= largest_captured:
            yield runner.bucket_for(size, 1)


def dummy_plan(
    bucket: Bucket, num_blocks: int, block_size: int, *, sampled: bool, scored: bool = False, late: bool = False
) -> BatchPlan:
    """A plan that fills a bucket with made-up requests in blocks from 0 up; only for a KV cache that holds nothing yet.

    Rows share the bucket's tokens evenly; each begins at position 0. sampled: draw at temperature 1 with every filter on, else greedily.
    scored: with the logprobs of every token drawn. late: the first token is drawn under a mask and from adjusted logits.
    """
    rows = np.arange(bucket.num_rows, dtype=np.int32)
    starts = np.linspace(0, bucket.num_tokens, bucket.num_rows + 1).astype(np.int32)
    lens = np.diff(starts)
    blocks_per_row = -(-lens // block_size)
    first_block = np.concatenate(([0], np.cumsum(blocks_per_row)))[:-1]
    columns = np.concatenate([np.arange(count) for count in blocks_per_row])
    table = BlockTableChanges(
        rows=np.repeat(rows, blocks_per_row),
        columns=columns.astype(np.int32),
        blocks=((np.repeat(first_block, blocks_per_row) + columns) % num_blocks).astype(np.int32),
    )
    samples = np.zeros(bucket.num_rows, dtype=np.bool_)
    samples[: bucket.num_samples] = True
    return BatchPlan(
        step=-1,
        rows=rows,
        query_start=starts,
        token_ids=np.arange(bucket.num_tokens, dtype=np.int32) % 97,
        seq_lens=lens.astype(np.int32),
        samples=samples,
        table=table,
        settings=_settings(rows, sampled),
        scoring=Scoring(samples[samples], _NO_I32, _NO_I32) if scored else None,
        masked=_mask_the_first(bucket.num_samples) if late and bucket.num_samples else None,
        adjusting=_adjust_the_first(bucket.num_samples) if late and bucket.num_samples else None,
    )


def dummy_masks(vocab_size: int) -> TokenMasks:
    """What the masked draw of a dummy plan waits for: a mask that allows every token."""
    return np.full((1, num_mask_words(vocab_size)), -1, dtype=np.int32)


def _mask_the_first(num_samples: int) -> MaskedDraws:
    return MaskedDraws(np.arange(num_samples) == 0, np.zeros(1, dtype=np.int64))


def _adjust_the_first(num_samples: int) -> Adjusting:
    settings = AdjustmentSettings(
        rows=np.zeros(1, dtype=np.int32),
        num_prompt_tokens=np.zeros(1, dtype=np.int32),
        penalties=np.ones((1, 3), dtype=np.float32),
        bias_ids=np.full((1, MAX_LOGIT_BIASES), -1, dtype=np.int32),
        biases=np.zeros((1, MAX_LOGIT_BIASES), dtype=np.float32),
        bad_words=np.full((1, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, dtype=np.int32),
        cached_slots=np.zeros(1, dtype=np.int64),
        cached_tokens=np.zeros(1, dtype=np.int32),
    )
    return Adjusting(np.arange(num_samples) == 0, np.zeros(1, dtype=np.int32), settings)


def shared_prefix_plan(num_rows: int, num_blocks: int, block_size: int) -> BatchPlan:
    """As `dummy_plan`: a step in which all rows decode their first token after a prefix that they share."""
    end = math.lcm(SHARED_PREFIX_STEP, block_size)
    rows, width = np.arange(num_rows, dtype=np.int32), end // block_size + 1
    blocks = np.tile(np.arange(width, dtype=np.int32), (num_rows, 1))
    blocks[:, -1] += rows
    members = np.arange(num_rows, dtype=np.int32)
    return BatchPlan(
        step=-1,
        rows=rows,
        query_start=np.arange(num_rows + 1, dtype=np.int32),
        token_ids=rows % 97,
        seq_lens=np.full(num_rows, end + 1, dtype=np.int32),
        samples=np.ones(num_rows, dtype=np.bool_),
        table=BlockTableChanges(
            rows=np.repeat(rows, width),
            columns=np.tile(np.arange(width, dtype=np.int32), num_rows),
            blocks=blocks.reshape(-1) % np.int32(num_blocks),
        ),
        settings=_settings(rows, sampled=True),
        shared=SharedPrefixPlan(
            groups=np.array([[0, 0, num_rows, 0, end]], dtype=np.int32),
            members=members,
            lens=np.full(num_rows, end, dtype=np.int32),
        ),
    )


def _settings(rows: np.ndarray, sampled: bool) -> RowSettings:
    def column(value: float, dtype: type) -> np.ndarray:
        return np.full(len(rows), value, dtype=dtype)

    return RowSettings(
        rows=rows,
        temperature=column(1.0 if sampled else 0.0, np.float32),
        top_k=column(50 if sampled else 0, np.int32),
        top_p=column(0.9 if sampled else 1.0, np.float32),
        min_p=column(0.01 if sampled else 0.0, np.float32),
        seed=column(0, np.int64),
        held_back_ids=np.full((len(rows), MAX_STOP_TOKEN_IDS), -1, dtype=np.int32),
        held_back_until=column(0, np.int32),
    )
