"""Paged attention and the merge of attention states in Triton against the reference: interpreted, and on a GPU where there is one.

Legend: T tokens, H query heads, K KV heads, D head dim, S parts.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toka.kernels.ops  # noqa: F401  (defines torch.ops.toka)

Run = Callable[..., Any]

# The interpreter cuts off bits where a GPU rounds, which doubles bfloat16's error.
ABSOLUTE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MAX_ROWS = 8
SPLIT = 256  # attention_states.SPLIT_TOKENS

Row = tuple[int, int]  # queries, tokens in the cache with them
MIXED: list[Row] = [(1, 1), (1, 17), (19, 19), (3, 70), (1, SPLIT + 44)]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """interpreted(op, *arguments): run `toka_triton::op` in a process whose Triton interprets; raises what it raises."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("triton_interpreter.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(op: str, *arguments: Any) -> Any:
        saved = io.BytesIO()
        torch.save((op, arguments), saved)
        pickle.dump(saved.getvalue(), stdin)
        stdin.flush()
        answer = torch.load(io.BytesIO(pickle.load(stdout)), weights_only=False)
        if isinstance(answer, Exception):
            raise answer
        return answer

    yield run
    stdin.close()
    assert process.wait(timeout=60) == 0


@dataclass
class Batch:
    """Arguments of paged_attention, in its order."""

    query_THD: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    rows_R: Tensor
    query_start: Tensor
    seq_lens_R: Tensor
    scale: float
    sliding_window: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def to(self, device: str) -> Batch:
        return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in self.arguments))

    def alone(self, i: int) -> Batch:
        """The same with row i only."""
        begin, end = int(self.query_start[i]), int(self.query_start[i + 1])
        return replace(
            self,
            query_THD=self.query_THD[begin:end],
            rows_R=self.rows_R[i : i + 1],
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens_R=self.seq_lens_R[i : i + 1],
        )


def make_batch(
    rows: list[Row],
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    window: int = 0,
    padded_rows: int = 1,
    padded_tokens: int = 3,
) -> Batch:
    """Rows in scattered blocks. What no query may see is NaN in the caches and out of range in the block table."""
    random = torch.Generator().manual_seed(len(rows))
    num_heads, num_kv_heads = heads
    blocks_per_row = [-(-seq_len // block_size) for _, seq_len in rows]
    num_blocks = sum(blocks_per_row) + 1
    order = iter((torch.randperm(num_blocks - 1, generator=random) + 1).tolist())
    key_cache = torch.full((num_blocks, num_kv_heads, block_size, head_dim), float("nan"))
    value_cache = key_cache.clone()
    block_table = torch.full((MAX_ROWS, max(blocks_per_row) + 2), 2**30, dtype=torch.int32)
    row_ids = torch.randperm(MAX_ROWS, generator=random)[: len(rows)].tolist()
    query_start = [0]
    for row_id, (num_queries, seq_len) in zip(row_ids, rows, strict=True):
        first_seen = max(0, seq_len - num_queries - window + 1) if window else 0
        for position in range(first_seen, seq_len):
            column, offset = divmod(position, block_size)
            if (column == first_seen // block_size and position == first_seen) or offset == 0:
                block_table[row_id, column] = next(order)
            for cache in (key_cache, value_cache):
                cache[block_table[row_id, column], :, offset] = torch.randn(num_kv_heads, head_dim, generator=random)
        query_start.append(query_start[-1] + num_queries)
    query_THD = torch.randn(query_start[-1] + padded_tokens, num_heads, head_dim, generator=random)
    return Batch(
        query_THD.to(dtype),
        key_cache.to(cache_dtype or dtype),
        value_cache.to(cache_dtype or dtype),
        block_table,
        torch.tensor(row_ids + [-1] * padded_rows, dtype=torch.int32),
        torch.tensor(query_start + query_start[-1:] * padded_rows, dtype=torch.int32),
        torch.tensor([seq_len for _, seq_len in rows] + [0] * padded_rows, dtype=torch.int32),
        head_dim**-0.5,
        window,
    )


def reference_of(batch: Batch) -> Tensor:
    """The reference looks every block up, seen or not, so blocks that are out of range are put into it."""
    table = batch.block_table.where(batch.block_table < len(batch.key_cache), 0)
    caches = (batch.key_cache.float().nan_to_num(), batch.value_cache.float().nan_to_num())
    expected: Tensor = torch.ops.toka.paged_attention.default(batch.query_THD, *caches, table, *batch.arguments[4:])
    return expected


def check(batch: Batch, run: Run) -> None:
    expected = reference_of(batch)
    actual = run("paged_attention", *batch.arguments)
    assert actual.dtype == expected.dtype
    tolerance = ABSOLUTE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert not actual[int(batch.query_start[-1]) :].any(), "padded tokens must be zero"


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_head_dims(interpreted: Run, head_dim: int) -> None:
    check(make_batch(MIXED, head_dim=head_dim), interpreted)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (20, 1)], ids=["MHA", "GQA", "MQA"])
def test_heads_of_one_group_go_together(interpreted: Run, heads: tuple[int, int]) -> None:
    check(make_batch([(1, 33), (18, 40), (1, SPLIT + 1)], heads=heads), interpreted)


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_block_sizes(interpreted: Run, block_size: int) -> None:
    check(
        make_batch([(1, block_size), (1, block_size + 1), (7, block_size), (2, 100)], block_size=block_size),
        interpreted,
    )


@pytest.mark.parametrize("window", [1, 50, 300])
def test_sliding_windows(interpreted: Run, window: int) -> None:
    check(make_batch([(1, 9), (1, 2 * SPLIT + 60), (70, 200), (20, 20)], window=window), interpreted)


@pytest.mark.parametrize("seq_len", [SPLIT - 1, SPLIT, 3 * SPLIT + 1])
def test_decode_at_the_edges_of_splits(interpreted: Run, seq_len: int) -> None:
    check(make_batch([(1, seq_len)]), interpreted)


@pytest.mark.parametrize("row", [(2, 2), (16, 16), (17, 17), (64, 64), (65, 130), (2, 129)], ids=str)
def test_prefill_at_the_edges_of_tiles(interpreted: Run, row: Row) -> None:
    check(make_batch([row]), interpreted)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_dtypes_of_query_and_cache(interpreted: Run, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    check(make_batch([(1, 40), (18, 50)], dtype=dtype, cache_dtype=cache_dtype), interpreted)


def test_every_fp8_number_is_read_right(interpreted: Run) -> None:
    """A value cache of all numbers there are, each seen alone: attention to one key is its value."""
    codes = torch.arange(256).view(torch.int64).to(torch.uint8)
    numbers = codes[(codes & 0x7F) != 0x7F]  # without NaN
    batch = make_batch([(1, 1)] * 4, heads=(1, 1), block_size=8, padded_rows=0, padded_tokens=0)
    cache = torch.zeros(5, 1, 8, 64, dtype=torch.uint8)
    for i, part in enumerate(torch.nn.functional.pad(numbers, (0, 2)).view(4, 64)):
        cache[batch.block_table[batch.rows_R[i], 0], 0, 0] = part
    fp8_cache = cache.view(torch.float8_e4m3fn)
    batch = replace(batch, key_cache=fp8_cache, value_cache=fp8_cache)
    assert torch.equal(interpreted("paged_attention", *batch.arguments), reference_of(batch))


def test_any_layout_of_queries(interpreted: Run) -> None:
    batch = make_batch([(1, 40), (5, 30)], heads=(4, 2))
    expected = interpreted("paged_attention", *batch.arguments)
    qkv_THD = torch.randn(batch.query_THD.shape[0], 8, 64)
    qkv_THD[:, :4] = batch.query_THD
    dim_first = batch.query_THD.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for query_THD in (qkv_THD[:, :4], dim_first):
        assert not query_THD.is_contiguous()
        assert torch.equal(interpreted("paged_attention", *replace(batch, query_THD=query_THD).arguments), expected)


def test_a_row_does_not_feel_its_neighbours(interpreted: Run) -> None:
    """BATCH_INVARIANT: whatever runs beside it, and in whichever bucket."""
    batch = make_batch([(1, 30), (1, 2 * SPLIT + 9), (19, 90)], padded_rows=14)
    together = interpreted("paged_attention", *batch.arguments)
    for i in range(3):
        begin, end = int(batch.query_start[i]), int(batch.query_start[i + 1])
        assert torch.equal(interpreted("paged_attention", *batch.alone(i).arguments), together[begin:end])


def test_a_prefill_may_be_cut_where_chunks_have_several_tokens(interpreted: Run) -> None:
    batch = make_batch([(40, 90)], padded_rows=0, padded_tokens=0)
    whole = interpreted("paged_attention", *batch.arguments)
    for begin, end in ((0, 23), (23, 40)):
        chunk = replace(
            batch,
            query_THD=batch.query_THD[begin:end],
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens_R=torch.tensor([50 + end], dtype=torch.int32),
        )
        assert torch.equal(interpreted("paged_attention", *chunk.arguments), whole[begin:end])


def test_a_broken_row_does_not_spoil_its_neighbours(interpreted: Run) -> None:
    batch = make_batch([(1, 20), (1, SPLIT + 9), (5, 9), (6, 6)])
    expected = interpreted("paged_attention", *batch.arguments)
    batch.query_THD[1:7] = float("nan")
    actual = interpreted("paged_attention", *batch.arguments)
    assert actual[1:7].isnan().all()
    assert torch.equal(actual[:1], expected[:1]) and torch.equal(actual[7:], expected[7:])


def test_only_padding(interpreted: Run) -> None:
    batch = make_batch([(4, 4)])
    idle = replace(batch, rows_R=torch.full_like(batch.rows_R, -1), query_start=torch.zeros_like(batch.query_start))
    assert not interpreted("paged_attention", *idle.arguments).any()
    no_rows = replace(
        batch, rows_R=batch.rows_R[:0], query_start=batch.query_start[:1], seq_lens_R=batch.seq_lens_R[:0]
    )
    assert not interpreted("paged_attention", *no_rows.arguments).any()
    no_tokens = replace(idle, query_THD=batch.query_THD[:0])
    assert interpreted("paged_attention", *no_tokens.arguments).shape == (0, 2, 64)


def test_bad_arguments_are_refused(interpreted: Run) -> None:
    batch = make_batch([(3, 40)])

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(Exception, match=message):
            interpreted("paged_attention", *replace(batch, **changes).arguments)

    refused("do not fit a cache", query_THD=batch.query_THD[:, :, :32])
    refused("must be int32", seq_lens_R=batch.seq_lens_R.long())
    refused("side by side", key_cache=batch.key_cache.transpose(2, 3).contiguous().transpose(2, 3))


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (3, 4, 2, 80), (17, 2, 3, 128), (40, 1, 2, 16)], ids=str)
def test_merge_attention(interpreted: Run, shape: tuple[int, int, int, int]) -> None:
    """Also where parts have no keys, whose outputs are undefined (NaN), and where no part has any."""
    random = torch.Generator().manual_seed(shape[0])
    output_STHD = torch.randn(shape, generator=random)
    lse_STH = torch.randn(shape[:3], generator=random) * 20
    lse_STH[torch.rand(shape[:3], generator=random) < 0.3] = -float("inf")
    lse_STH[:, 0, 0] = -float("inf")
    output_STHD[lse_STH == -float("inf")] = float("nan")
    actual = interpreted("merge_attention", output_STHD, lse_STH)
    expected = torch.ops.toka.merge_attention.default(output_STHD, lse_STH)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
    assert expected[1][0, 0] == -float("inf")


def test_merging_no_tokens(interpreted: Run) -> None:
    output_THD, lse_TH = interpreted("merge_attention", torch.empty(2, 0, 3, 64), torch.empty(2, 0, 3))
    assert output_THD.shape == (0, 3, 64) and lse_TH.shape == (0, 3)


class Launches:
    """Stands in for a kernel and records its grids."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.grids.append(grid)


def test_launches_need_shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they can be captured: tensors without data would raise if the host looked at one."""
    from toka.kernels.triton import decode_attention, paged_attention, prefill_attention

    launches = Launches()
    monkeypatch.setattr(decode_attention, "decode_attention_kernel", launches)
    monkeypatch.setattr(decode_attention, "combine_parts_kernel", launches)
    monkeypatch.setattr(prefill_attention, "prefill_attention_kernel", launches)
    batch = make_batch(MIXED).to("meta")
    out_THD = paged_attention.paged_attention(*batch.arguments)
    assert out_THD.shape == batch.query_THD.shape
    assert launches.grids == [(3,), (6, 2), (3,)]


@pytest.mark.parametrize(("max_rows", "context"), [(256, 131072), (1024, 131072), (256, 4096), (8, 100)])
def test_the_workspace_is_bounded(max_rows: int, context: int) -> None:
    from toka.kernels.triton.attention_states import (
        MAX_SHARED_SPLITS,
        MIN_SPLITS_CAP,
        SHARED_WORKSPACE_BYTES,
        WORKSPACE_BYTES,
        most_shared_splits,
        most_splits,
        states_of,
    )
    from toka.kernels.triton.attention_tile import Problem

    cache = torch.empty(10, 8, 16, 128, device="meta")
    table = torch.empty(max_rows, -(-context // 16), dtype=torch.int32, device="meta")
    ints = torch.empty(4, dtype=torch.int32, device="meta")
    query_THD = torch.empty(4, 32, 128, device="meta")
    tensors = (query_THD, cache, cache, table, ints, ints, ints)
    splits = most_splits(Problem(*tensors, 1.0, 0))
    assert 1 <= splits <= -(-context // SPLIT)
    assert splits == MIN_SPLITS_CAP or max_rows * 32 * splits * 128 * 4 <= WORKSPACE_BYTES
    assert most_splits(Problem(*tensors, 1.0, 300)) == min(splits, 3)

    shared = (torch.empty(6, 5, dtype=torch.int32, device="meta"), ints, ints)
    shared_splits = most_shared_splits(Problem(*tensors, 1.0, 0, *shared))
    assert 1 <= shared_splits <= min(-(-context // SPLIT), MAX_SHARED_SPLITS)
    assert shared_splits == 1 or 3 * max_rows * 32 * shared_splits * 128 * 4 <= SHARED_WORKSPACE_BYTES
    for without in (
        Problem(*tensors, 1.0, 0),
        Problem(*tensors, 1.0, 300, *shared),
        Problem(*tensors, 1.0, 0, shared[0][:1], *shared[1:]),
    ):
        states = states_of(without, torch.device("meta"))
        assert (states.max_shared_splits, states.num_parts) == (0, states.max_splits)
        assert states.num_bytes == (4 * 32 * states.max_splits * 129 * 4 if states.max_splits > 1 else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ABSOLUTE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("window", [0, 100])
def test_on_a_gpu_as_captured(head_dim: int, dtype: torch.dtype, window: int) -> None:
    """A graph captured for one step computes another of the same shape."""
    from toka.kernels.triton.library import load

    load()
    op = torch.ops.toka_triton.paged_attention.default
    rows: list[Row] = [*MIXED, (300, 700), (1, 5000)]
    batch = make_batch(rows, heads=(8, 2), head_dim=head_dim, dtype=dtype, window=window)
    expected = reference_of(batch)
    static = batch.to("cuda")
    static.query_THD.zero_()
    op(*static.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = op(*static.arguments)
    static.query_THD.copy_(batch.query_THD)
    graph.replay()
    torch.testing.assert_close(out_THD.cpu(), expected, atol=ABSOLUTE[dtype], rtol=ABSOLUTE[dtype])
