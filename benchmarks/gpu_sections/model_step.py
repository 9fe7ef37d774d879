"""One step of the warm engine, through the executor that serves requests: decode by batch size, prefill by prompt length."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu_sections.built_engine import BuiltEngine
from gpu_sections.measure import Deadline, copy_gb_per_s, matmul_tflop_per_s
from gpu_sections.shapes import Shape
from toka.engine.executor import Executor
from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import BatchPlan, BlockTableChanges, RowSettings

IN_FLIGHT = 2
MIN_STEPS, MAX_STEPS = 3, 200


def measure(built: BuiltEngine, shape: Shape, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Yields the limits measured in this process, then a figure for each batch and each prompt length."""
    limits = {
        "copy_gb_per_s": copy_gb_per_s(built.device),
        "matmul_tflop_per_s": matmul_tflop_per_s(built.device, built.setup.dtype),
    }
    yield "limits", limits
    context = min(shape.context, built.ready.num_kv_blocks // max(shape.batches) * built.ready.block_size)
    num_filled = 0
    for batch in shape.batches:
        if deadline.is_over:
            yield "cut", f"no time left from decode_{batch} on"
            return
        _fill_cache(built, range(num_filled, batch), context)
        num_filled = batch
        yield f"decode_{batch}", _decode(built, batch, context, limits["copy_gb_per_s"], deadline)
    for num_tokens in shape.prefills:
        if deadline.is_over:
            yield "cut", f"no time left from prefill_{num_tokens} on"
            return
        yield f"prefill_{num_tokens}", _prefill(built, num_tokens, limits["matmul_tflop_per_s"], deadline)


def _fill_cache(built: BuiltEngine, rows: range, context: int) -> None:
    """Compute prompts in these rows: what a cache held when it was allocated can be NaN, of which no token can be drawn."""
    rows_per_step = built.setup.config.max_tokens_per_forward // context
    starts = range(rows.start, rows.stop, rows_per_step)
    plans = [
        uniform_plan(min(rows_per_step, rows.stop - start), context, context, built.ready.block_size, first_row=start)
        for start in starts
    ]
    run_steps(built.core.executor, plans)


def _decode(built: BuiltEngine, batch: int, context: int, copy: float, deadline: Deadline) -> dict[str, float]:
    plan = uniform_plan(batch, 1, context, built.ready.block_size)
    again = dataclasses.replace(plan, token_ids=-1 - plan.rows)  # each row goes on from what it drew
    ms, alone_ms = _time(built.core.executor, plan, again, deadline)
    num_bytes = built.weight_bytes + batch * context * built.kv_bytes_per_token
    rate = num_bytes / ms / 1e6
    return {
        "ms": ms,
        "alone_ms": alone_ms,
        "tokens_per_s": batch / ms * 1e3,
        "context": context,
        "gb_per_s": rate,
        "share_of_copy": rate / copy,
    }


def _prefill(built: BuiltEngine, num_tokens: int, matmul: float, deadline: Deadline) -> dict[str, float]:
    plan = uniform_plan(1, num_tokens, num_tokens, built.ready.block_size)
    ms, alone_ms = _time(built.core.executor, plan, plan, deadline)
    spec = built.setup.spec
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim * num_tokens * (num_tokens + 1) / 2
    head = 2 * spec.hidden_size * spec.vocab_size  # of the one token whose successor is drawn
    rate = (2 * built.weight_products * num_tokens + attention + head) / ms / 1e9
    return {"ms": ms, "alone_ms": alone_ms, "tflop_per_s": rate, "share_of_matmul": rate / matmul}


def _time(executor: Executor, first: BatchPlan, again: BatchPlan, deadline: Deadline) -> tuple[float, float]:
    """Milliseconds per step when the next is always launched before the last is read back, and of a step alone."""
    run_steps(executor, [first, again, again])
    alone_s = []
    for _ in range(MIN_STEPS):
        began = time.perf_counter()
        run_steps(executor, [again])
        alone_s.append(time.perf_counter() - began)
    share_s = min(1.0, max(deadline.left_s, 0.0) / 10)  # of the section's time, for one figure
    count = min(max(int(share_s / statistics.median(alone_s)), MIN_STEPS), MAX_STEPS)
    began = time.perf_counter()
    run_steps(executor, [again] * count)
    return (time.perf_counter() - began) / count * 1e3, statistics.median(alone_s) * 1e3


def run_steps(executor: Executor, plans: list[BatchPlan]) -> None:
    """Run the plans as the engine's loop does, and wait for the last."""
    for plan in plans:
        executor.launch(plan)
        if executor.num_in_flight == IN_FLIGHT:
            executor.wait()
    while executor.num_in_flight:
        executor.wait()


def uniform_plan(batch: int, num_queries: int, seq_len: int, block_size: int, first_row: int = 0) -> BatchPlan:
    """`batch` rows of `num_queries` new tokens each, that then have seq_len tokens in blocks of their own; greedy.

    For an engine without requests: the plan takes the rows from first_row on, and each row the blocks that are its share from 0 up.
    """
    rows = np.arange(first_row, first_row + batch, dtype=np.int32)
    blocks_per_row = -(-seq_len // block_size)
    table = BlockTableChanges(
        rows=np.repeat(rows, blocks_per_row),
        columns=np.tile(np.arange(blocks_per_row, dtype=np.int32), batch),
        blocks=np.arange(first_row * blocks_per_row, (first_row + batch) * blocks_per_row, dtype=np.int32),
    )

    def column(value: float, dtype: type) -> np.ndarray:
        return np.full(batch, value, dtype=dtype)

    settings = RowSettings(
        rows=rows,
        temperature=column(0, np.float32),
        top_k=column(0, np.int32),
        top_p=column(1, np.float32),
        min_p=column(0, np.float32),
        seed=column(0, np.int64),
        held_back_ids=np.full((batch, MAX_STOP_TOKEN_IDS), -1, dtype=np.int32),
        held_back_until=column(0, np.int32),
    )
    return BatchPlan(
        step=-1,
        rows=rows,
        query_start=np.arange(batch + 1, dtype=np.int32) * num_queries,
        token_ids=np.arange(batch * num_queries, dtype=np.int32) % 97,
        seq_lens=column(seq_len, np.int32),
        samples=np.ones(batch, dtype=np.bool_),
        table=table,
        settings=settings,
    )
