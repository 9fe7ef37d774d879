"""Every implementation of paged attention for CPUs against the reference, and the promises of the C++ one.

Legend: T tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toka.kernels.registry import Implementation, implementations

pytestmark = pytest.mark.usefixtures("cpp_kernels")

FAST = [i for i in implementations("paged_attention") if i.family not in ("reference", "triton")]
ABSOLUTE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MAX_ROWS = 16


@dataclass(frozen=True)
class Row:
    """One row of a step: the last num_queries of seq_len tokens are computed."""

    num_queries: int
    seq_len: int


@dataclass
class Batch:
    """Arguments of the operator, in its order."""

    query_THD: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    rows_R: Tensor
    query_start: Tensor
    seq_lens_R: Tensor
    scale: float
    sliding_window: int

    def run(self, implementation: Implementation) -> Tensor:
        return implementation.overload(*vars(self).values())


def make_batch(
    rows: list[Row],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    sliding_window: int = 0,
    padded_rows: int = 1,
    padded_tokens: int = 3,
    seed: int = 0,
) -> Batch:
    """A step over scattered blocks. Cache entries that no row may read are NaN, so that reading one shows."""
    random = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    blocks_per_row = [-(-row.seq_len // block_size) for row in rows]
    num_blocks = sum(blocks_per_row) + 1
    cache_shape = (num_blocks, num_kv_heads, block_size, head_dim)
    key_cache = torch.full(cache_shape, float("nan"), dtype=cache_dtype or dtype)
    value_cache = key_cache.clone()
    free_blocks = (torch.randperm(num_blocks - 1, generator=random) + 1).tolist()
    row_ids = torch.randperm(MAX_ROWS, generator=random)[: len(rows)].tolist()
    block_table = torch.full((MAX_ROWS, max(blocks_per_row) + 1), -1, dtype=torch.int32)
    query_start = [0]
    for row_id, row, count in zip(row_ids, rows, blocks_per_row, strict=True):
        blocks = [free_blocks.pop() for _ in range(count)]
        block_table[row_id, :count] = torch.tensor(blocks, dtype=torch.int32)
        for column, block in enumerate(blocks):
            filled = min(block_size, row.seq_len - column * block_size)
            for cache in (key_cache, value_cache):
                cache[block, :, :filled] = torch.randn(num_kv_heads, filled, head_dim, generator=random)
        query_start.append(query_start[-1] + row.num_queries)
    query_THD = torch.randn(query_start[-1] + padded_tokens, num_heads, head_dim, generator=random)
    return Batch(
        query_THD.to(dtype),
        key_cache,
        value_cache,
        block_table,
        torch.tensor(row_ids + [-1] * padded_rows, dtype=torch.int32),
        torch.tensor(query_start + [query_start[-1]] * padded_rows, dtype=torch.int32),
        torch.tensor([row.seq_len for row in rows] + [0] * padded_rows, dtype=torch.int32),
        head_dim**-0.5,
        sliding_window,
    )


def check_against_reference(batch: Batch, implementation: Implementation) -> None:
    expected = torch.ops.toka.paged_attention.default(*vars(batch).values())
    actual = batch.run(implementation)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, atol=ABSOLUTE[expected.dtype], rtol=ABSOLUTE[expected.dtype])
    owned = int(batch.query_start[-1])
    assert not actual[owned:].any(), "padded tokens must be zero"


MIXED = [Row(1, 1), Row(1, 77), Row(37, 37), Row(130, 130), Row(5, 300), Row(1, 700)]


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("dtype", ABSOLUTE, ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 72, 80, 96, 128, 256])
def test_head_dims(implementation: Implementation, head_dim: int, dtype: torch.dtype) -> None:
    check_against_reference(make_batch(MIXED, head_dim=head_dim, dtype=dtype), implementation)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (2, 1), (9, 3), (12, 3), (5, 1), (6, 1), (14, 2), (8, 1)], ids=str)
def test_head_ratios(implementation: Implementation, heads: tuple[int, int]) -> None:
    check_against_reference(make_batch(MIXED, heads=heads), implementation)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64, 100, 128])
@pytest.mark.parametrize("sliding_window", [0, 1, 50, 333])
def test_block_sizes_and_windows(implementation: Implementation, block_size: int, sliding_window: int) -> None:
    check_against_reference(make_batch(MIXED, block_size=block_size, sliding_window=sliding_window), implementation)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 255, 256, 257, 1023, 1025, 5000])
@pytest.mark.parametrize("sliding_window", [0, 1000])
def test_decode_of_one_row(implementation: Implementation, seq_len: int, sliding_window: int) -> None:
    check_against_reference(make_batch([Row(1, seq_len)], heads=(9, 3), sliding_window=sliding_window), implementation)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_long_prefill_beside_many_decodes(implementation: Implementation) -> None:
    rows = [Row(600, 2100), *(Row(1, 31 * i + 1) for i in range(12)), Row(1, 5000)]
    check_against_reference(make_batch(rows, heads=(9, 3)), implementation)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cache_dtype_differs_from_query_dtype(implementation: Implementation, cache_dtype: torch.dtype) -> None:
    check_against_reference(make_batch(MIXED, cache_dtype=cache_dtype), implementation)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_any_query_layout(implementation: Implementation) -> None:
    batch = make_batch(MIXED)
    expected = batch.run(implementation)
    heads_first = batch.query_THD.transpose(0, 1).contiguous().transpose(0, 1)
    dim_first = batch.query_THD.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for query_THD in (heads_first, dim_first):
        assert not query_THD.is_contiguous()
        assert torch.equal(replace(batch, query_THD=query_THD).run(implementation), expected)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_only_padding(implementation: Implementation) -> None:
    batch = make_batch([Row(4, 4)])
    batch = replace(batch, rows_R=torch.full_like(batch.rows_R, -1), query_start=torch.zeros_like(batch.query_start))
    assert not batch.run(implementation).any()


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_a_row_does_not_feel_its_neighbours(implementation: Implementation) -> None:
    batch = make_batch(MIXED, heads=(9, 3))
    together = batch.run(implementation)
    for i in range(len(MIXED)):
        begin, end = int(batch.query_start[i]), int(batch.query_start[i + 1])
        alone = replace(
            batch,
            query_THD=batch.query_THD[begin:end],
            rows_R=batch.rows_R[i : i + 1],
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens_R=batch.seq_lens_R[i : i + 1],
        )
        assert torch.equal(alone.run(implementation), together[begin:end])


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_a_broken_row_does_not_spoil_its_neighbours(implementation: Implementation) -> None:
    batch = make_batch(MIXED)
    expected = batch.run(implementation)
    begin, end = int(batch.query_start[2]), int(batch.query_start[3])
    batch.query_THD[begin:end] = float("nan")
    actual = batch.run(implementation)
    assert actual[begin:end].isnan().all()
    assert torch.equal(actual[:begin], expected[:begin]) and torch.equal(actual[end:], expected[end:])


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_the_thread_count_changes_nothing(implementation: Implementation) -> None:
    batch = make_batch([Row(1, 5000), Row(200, 300), Row(1, 1500)], heads=(9, 3))
    num_threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(batch.run(implementation))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("sliding_window", [0, 90])
def test_the_cut_of_a_prefill_changes_nothing(implementation: Implementation, sliding_window: int) -> None:
    """One prefill, the same in chunks, and its last token by decode: bitwise the same."""
    seq_len = 700
    batch = make_batch(
        [Row(seq_len, seq_len)], heads=(9, 3), sliding_window=sliding_window, padded_rows=0, padded_tokens=0
    )
    whole = batch.run(implementation)
    for begin, end in ((0, 1), (0, 100), (100, 333), (333, 699), (699, 700)):
        chunk = replace(
            batch,
            query_THD=batch.query_THD[begin:end],
            query_start=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens_R=torch.tensor([end], dtype=torch.int32),
        )
        assert torch.equal(chunk.run(implementation), whole[begin:end])


def test_bad_arguments_are_refused(cpp_kernels: Path) -> None:
    batch = make_batch([Row(3, 40)], padded_rows=0)
    op = torch.ops.toka_cpp.paged_attention.default

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(RuntimeError, match=message):
            op(*vars(replace(batch, **changes)).values())

    refused("outside of the block table", rows_R=torch.tensor([MAX_ROWS], dtype=torch.int32))
    refused("fit its block table", seq_lens_R=torch.tensor([10_000], dtype=torch.int32))
    refused("must hold the row's queries", seq_lens_R=torch.tensor([2], dtype=torch.int32))
    refused("query_start must ascend", query_start=torch.tensor([0, 1000], dtype=torch.int32))
    refused("seq_lens must be Int", seq_lens_R=torch.tensor([40]))
    refused("float32, bfloat16 or float16", query_THD=batch.query_THD.double())
    bad_table = batch.block_table.clone()
    bad_table[batch.rows_R[0], 1] = 10_000
    refused("block outside of the cache", block_table=bad_table)
