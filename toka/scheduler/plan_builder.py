"""Turns a step's decode rows and prompt chunks into the flat arrays of a BatchPlan."""

from __future__ import annotations

import numpy as np

from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import I32, I64, BatchPlan, BlockTableChanges, RowSettings, SharedPrefixPlan
from toka.scheduler.adjustments import adjustments_of
from toka.scheduler.batching import (
    NONE_FILLED,
    Chunk,
    DecodeSet,
    EndsWithoutToken,
    Filled,
    StepInFlight,
    adjusting,
    masked_draws,
)
from toka.scheduler.request import Request
from toka.scheduler.request_table import RequestTable
from toka.scheduler.scoring import plan_scoring

_NO_I32 = np.empty(0, dtype=np.int32)
_NO_ROWS = np.empty(0, dtype=np.intp)
_NO_F32 = np.empty(0, dtype=np.float32)
NO_TABLE_CHANGES = BlockTableChanges(rows=_NO_I32, columns=_NO_I32, blocks=_NO_I32)
NO_SETTINGS = RowSettings(
    rows=_NO_I32,
    temperature=_NO_F32,
    top_k=_NO_I32,
    top_p=_NO_F32,
    min_p=_NO_F32,
    seed=np.empty(0, dtype=np.int64),
    held_back_ids=np.empty((0, MAX_STOP_TOKEN_IDS), dtype=np.int32),
    held_back_until=_NO_I32,
)


def build_decode_plan(
    step: int,
    decodes: DecodeSet,
    seq_lens: I32,
    changes: BlockTableChanges,
    filled: Filled,
    shared: SharedPrefixPlan | None,
    epoch: int,
) -> tuple[BatchPlan, StepInFlight]:
    """A step of decode rows alone: the arrays of the set as they are, plus seq_lens int32 [R]."""
    plan = BatchPlan(
        step=step,
        rows=decodes.rows_i32,
        query_start=decodes.query_start,
        token_ids=decodes.token_ids,
        seq_lens=seq_lens,
        samples=decodes.samples,
        table=changes,
        settings=NO_SETTINGS,
        shared=shared,
        scoring=decodes.scoring,
        masked=decodes.masked,
        adjusting=decodes.adjusting,
    )
    in_flight = StepInFlight(
        step=step,
        num_rows=len(decodes),
        drawn=None,
        rows=decodes.rows,
        request_ids=decodes.request_ids,
        num_cached_tokens=decodes.num_cached_tokens,
        generations=decodes.generations,
        epoch=epoch,
        filled=filled,
        scoring=decodes.scoring_in_flight,
    )
    return plan, in_flight


def build_mixed_plan(
    step: int,
    decodes: DecodeSet,
    seq_lens: I32,
    chunks: list[Chunk],
    changes: BlockTableChanges,
    admitted: list[tuple[int, Request]],
    filled: Filled,
    shared: SharedPrefixPlan | None,
    table: RequestTable,
) -> tuple[BatchPlan, StepInFlight]:
    """A step with prompt chunks after the decode rows (of which there may be none). admitted: requests that get these rows in it."""
    chunk_rows = np.array([c.row for c in chunks], dtype=np.intp)
    chunk_lens = np.array([c.stop - c.start for c in chunks], dtype=np.int32)
    chunk_ends = np.array([c.stop for c in chunks], dtype=np.int32)
    rows = np.concatenate((decodes.rows, chunk_rows))
    samples = np.concatenate((decodes.samples, np.array([c.draws for c in chunks], dtype=np.bool_)))
    first = decodes.query_start[-1]
    query_start = np.concatenate((decodes.query_start, first + np.cumsum(chunk_lens, dtype=np.int32)))
    drawn = np.flatnonzero(samples)
    drawn_rows = rows[drawn]
    scoring, scoring_in_flight = plan_scoring(drawn_rows, chunks, query_start[len(decodes) : -1], table)
    plan = BatchPlan(
        step=step,
        rows=rows.astype(np.int32),
        query_start=query_start,
        token_ids=np.concatenate((decodes.token_ids, *(table.tokens[c.row, c.start : c.stop] for c in chunks))),
        seq_lens=np.concatenate((seq_lens, chunk_ends)),
        samples=samples,
        table=changes,
        settings=settings_of(admitted),
        shared=shared,
        scoring=scoring,
        masked=masked_draws(drawn_rows, table),
        adjusting=adjusting(
            drawn_rows, np.repeat(rows, np.diff(query_start)), table, adjustments_of(admitted, chunks, table)
        ),
    )
    in_flight = StepInFlight(
        step=step,
        num_rows=len(rows),
        drawn=None if len(drawn) == len(rows) else drawn,
        rows=drawn_rows,
        request_ids=table.request_id[drawn_rows],
        num_cached_tokens=table.num_cached_tokens[drawn_rows],
        generations=table.generation[drawn_rows],
        epoch=table.epoch,
        filled=filled,
        scoring=scoring_in_flight,
        ends=EndsWithoutToken.of(chunks, table),
    )
    return plan, in_flight


def build_pooling_plan(
    step: int, chunks: list[Chunk], changes: BlockTableChanges, table: RequestTable
) -> tuple[BatchPlan, StepInFlight]:
    """A step of prompt chunks from which nothing is drawn; of those that end in it the vectors are wanted."""
    rows = np.array([c.row for c in chunks], dtype=np.intp)
    lens = np.array([c.stop - c.start for c in chunks], dtype=np.int32)
    plan = BatchPlan(
        step=step,
        rows=rows.astype(np.int32),
        query_start=np.concatenate((np.zeros(1, dtype=np.int32), np.cumsum(lens, dtype=np.int32))),
        token_ids=np.concatenate([table.tokens[c.row, c.start : c.stop] for c in chunks]),
        seq_lens=np.array([c.stop for c in chunks], dtype=np.int32),
        samples=np.array([c.last for c in chunks], dtype=np.bool_),
        table=changes,
        settings=NO_SETTINGS,
    )
    in_flight = StepInFlight(
        step=step,
        num_rows=len(rows),
        drawn=_NO_ROWS,
        rows=_NO_ROWS,
        request_ids=np.empty(0, dtype=np.int64),
        num_cached_tokens=_NO_I32,
        generations=_NO_I32,
        epoch=table.epoch,
        filled=NONE_FILLED,
        ends=EndsWithoutToken.of(chunks, table),
    )
    return plan, in_flight


def settings_of(admitted: list[tuple[int, Request]]) -> RowSettings:
    """Sampling settings of requests that get these rows in this step."""
    if not admitted:
        return NO_SETTINGS
    sampling = [request.sampling for _, request in admitted]
    held_back_ids = np.full((len(admitted), MAX_STOP_TOKEN_IDS), -1, dtype=np.int32)
    held_back_until = np.zeros(len(admitted), dtype=np.int32)
    for i, (_, request) in enumerate(admitted):
        if request.sampling.min_tokens:
            held_back_ids[i, : len(request.stop_token_ids)] = request.stop_token_ids
            held_back_until[i] = request.num_prompt_tokens + request.sampling.min_tokens
    return RowSettings(
        rows=np.array([row for row, _ in admitted], dtype=np.int32),
        temperature=np.array([s.temperature for s in sampling], dtype=np.float32),
        top_k=np.array([s.top_k for s in sampling], dtype=np.int32),
        top_p=np.array([s.top_p for s in sampling], dtype=np.float32),
        min_p=np.array([s.min_p for s in sampling], dtype=np.float32),
        seed=_as_int64([request.seed for _, request in admitted]),
        held_back_ids=held_back_ids,
        held_back_until=held_back_until,
    )


def merge_table_changes(parts: list[BlockTableChanges]) -> BlockTableChanges:
    """All entries of the parts, in order."""
    if len(parts) < 2:
        return parts[0] if parts else NO_TABLE_CHANGES
    return BlockTableChanges(
        rows=np.concatenate([p.rows for p in parts]),
        columns=np.concatenate([p.columns for p in parts]),
        blocks=np.concatenate([p.blocks for p in parts]),
    )


def _as_int64(values: list[int]) -> I64:
    """Python ints as int64, two's complement beyond 63 bits (a seed plus its sample's number may pass the end)."""
    return np.array([v & 0xFFFF_FFFF_FFFF_FFFF for v in values], dtype=np.uint64).view(np.int64)
