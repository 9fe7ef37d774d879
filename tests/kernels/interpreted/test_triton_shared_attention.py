"""Attention over shared prefixes in Triton against the reference, which computes every row by itself.

Legend: T tokens, H query heads, K KV heads, D head dim, G groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

BLOCK_SIZE = 16
NOWHERE = 2**30  # a block that no cache has
# Beyond what an output is rounded by. The interpreter cuts bfloat16 off where a GPU rounds.
ABSOLUTE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Group:
    """Rows members[...], places in the batch, share positions [begin, end)."""

    level: int
    members: Sequence[int]
    begin: int
    end: int


@dataclass
class Batch:
    """Arguments of paged_attention. known_table: the block table with every block that a row has; the one that kernels get (block_table)
    leaves out those of shared positions, but for each group's first member.
    """

    query_THD: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    rows_R: Tensor
    query_start: Tensor
    seq_lens_R: Tensor
    scale: float
    shared: tuple[Tensor, Tensor, Tensor]
    known_table: Tensor = field(repr=False)

    @property
    def arguments(self) -> tuple[Any, ...]:
        step = (self.query_THD, self.key_cache, self.value_cache, self.block_table)
        return (*step, self.rows_R, self.query_start, self.seq_lens_R, self.scale, 0, *self.shared)

    def run(self, window: int = 0) -> Tensor:
        return self._attend(torch.ops.toka_triton, self.block_table, window, *self.shared)

    def run_plain(self, window: int = 0) -> Tensor:
        return self._attend(torch.ops.toka_triton, self.known_table, window)

    def reference(self, window: int = 0) -> Tensor:
        return self._attend(torch.ops.toka, self.known_table, window, *self.shared)

    def _attend(self, ops: Any, table: Tensor, window: int, *shared: Tensor) -> Tensor:
        caches, lens = (self.key_cache, self.value_cache), (self.rows_R, self.query_start, self.seq_lens_R)
        out_THD: Tensor = ops.paged_attention.default(
            self.query_THD, *caches, table, *lens, self.scale, window, *shared
        )
        return out_THD


def make_batch(
    lens: Sequence[int],
    groups: Sequence[Group],
    *,
    prefills: Sequence[int] = (),
    padded: Sequence[int] = (),
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    num_lines: int = 0,
) -> Batch:
    """A step of one row for each of lens, with one query, and then of rows with `prefills` queries each after 40 cached tokens.

    padded: places that are padded rows instead. num_lines: at least so many are told of groups. What no query may see is NaN in the caches.
    """
    random = torch.Generator().manual_seed(len(lens) + len(groups))
    num_heads, num_kv_heads = heads
    queries = [0 if i in padded else 1 for i in range(len(lens))] + list(prefills)
    seq_lens = [0 if i in padded else length for i, length in enumerate(lens)] + [40 + count for count in prefills]
    num_rows, width = len(seq_lens), max(-(-length // BLOCK_SIZE) for length in seq_lens) + 2
    rows = torch.randperm(num_rows, generator=random, dtype=torch.int32)

    blocks = iter((torch.randperm(num_rows * width, generator=random) + 1).tolist())
    table = torch.full((num_rows, width), NOWHERE, dtype=torch.int32)
    for row, length in zip(rows.tolist(), seq_lens, strict=True):
        for column in range(-(-length // BLOCK_SIZE)):
            table[row, column] = next(blocks)
    visible = table.clone()
    for group in groups:
        columns = slice(group.begin // BLOCK_SIZE, group.end // BLOCK_SIZE)
        first, *others = rows[list(group.members)].tolist()
        table[others, columns] = table[first, columns].clone()
        visible[others, columns] = NOWHERE

    shape = (num_rows * width + 1, num_kv_heads, BLOCK_SIZE, head_dim)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    for cache in caches:
        for row, length in zip(rows.tolist(), seq_lens, strict=True):
            full, rest = divmod(length, BLOCK_SIZE)
            held = table[row, :full].long()
            cache[held] = torch.randn(full, *shape[1:], generator=random)
            if rest:
                cache[table[row, full], :, :rest] = torch.randn(num_kv_heads, rest, head_dim, generator=random)
    rows[list(padded)] = -1
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    query_THD = torch.randn(int(starts[-1]) + 3, num_heads, head_dim, generator=random)
    return Batch(
        query_THD.to(dtype),
        *(cache.to(cache_dtype or dtype) for cache in caches),
        visible,
        rows,
        starts,
        torch.tensor(seq_lens, dtype=torch.int32),
        head_dim**-0.5,
        shared_tensors(groups, num_rows, num_lines),
        table,
    )


def shared_tensors(groups: Sequence[Group], num_rows: int, num_lines: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator is told. After the groups there is one without members; what comes then must not be looked at."""
    lines, members = [], list[int]()
    lens = torch.zeros(num_rows + 2, dtype=torch.int32)
    for group in groups:
        lines.append([group.level, len(members), len(members) + len(group.members), group.begin, group.end])
        members += group.members
        lens[list(group.members)] = lens[list(group.members)].clamp(min=group.end)
    lines.append([7, 3, 3, 64, 10**9])
    lines += [[0, 0, 2, 0, 64]] * (num_lines - len(lines))
    members += [NOWHERE] * max(0, 100 - len(members))
    return torch.tensor(lines, dtype=torch.int32).reshape(-1, 5), torch.tensor(members, dtype=torch.int32), lens


@contextlib.contextmanager
def memory_filled_with_nan() -> Iterator[None]:
    """What torch.empty returns holds NaN, or the largest whole number."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    dtype = expected.dtype
    torch.testing.assert_close(actual, expected, atol=ABSOLUTE[dtype], rtol=torch.finfo(dtype).eps)


def check(batch: Batch) -> None:
    with memory_filled_with_nan():
        actual = batch.run()
    assert_close(actual, batch.reference())
    assert not actual[int(batch.query_start[-1]) :].any(), "padded tokens must be zero"


SIX = [330 + 13 * i for i in range(6)]
CASES = {
    "all rows": [Group(0, range(6), 0, 256)],
    "all but one position": [Group(0, [0, 1], 0, 320)],
    "not side by side": [Group(0, [5, 2, 4], 0, 192)],
    "one member": [Group(0, [4], 0, 128)],
    "two groups": [Group(0, [0, 2, 4], 0, 320), Group(0, [1, 3, 5], 0, 64)],
    "nested": [Group(0, range(5), 0, 128), Group(1, [1, 3], 128, 256), Group(1, [0, 2], 128, 192)],
    "three levels": [
        Group(0, range(6), 0, 64),
        Group(1, [0, 2, 4], 64, 192),
        Group(1, [1, 3], 64, 256),
        Group(2, [4, 2], 192, 320),
    ],
    "levels in any order": [Group(2, [1, 2], 128, 192), Group(0, range(5), 0, 64), Group(1, range(4), 64, 128)],
}


@pytest.mark.parametrize("name", CASES)
def test_groups_change_nothing(name: str) -> None:
    check(make_batch(SIX, CASES[name], num_lines=10))


@pytest.mark.parametrize("num_members", [1, 15, 16, 17])
def test_groups_at_the_edges_of_tiles(num_members: int) -> None:
    """A tile has 16 members of two heads each."""
    check(make_batch([129] * (num_members + 2), [Group(0, range(1, num_members + 1), 0, 128)]))


def test_a_large_group() -> None:
    check(make_batch([65 + i % 40 for i in range(202)], [Group(0, range(1, 201), 0, 64)], heads=(1, 1)))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_head_dims(head_dim: int) -> None:
    check(make_batch([200, 300, 150, 70], [Group(0, [0, 1, 2], 0, 128), Group(1, [0, 1], 128, 192)], head_dim=head_dim))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 2), (5, 1), (8, 1)], ids=str)
def test_heads_of_one_group_go_together(heads: tuple[int, int]) -> None:
    check(make_batch([200] * 8, [Group(0, range(7), 0, 128), Group(1, range(3, 6), 128, 192)], heads=heads))


@pytest.mark.parametrize("length", [256, 1024, 1984])
def test_a_long_prefix_is_cut_into_splits(length: int) -> None:
    """With splits of the rows' own keys beside them, of which the last row has more than are joined at once."""
    own = [1, 257, 17 * 256]
    groups = [Group(0, range(3), 0, length), Group(1, [1, 2], length, length + 192)]
    check(make_batch([length + own[0], *(length + 192 + tokens for tokens in own[1:])], groups))


def test_other_rows_beside_the_groups() -> None:
    """Prefills, rows in no group (of several splits too), padded rows in between."""
    lens = [150, 1, 200, 99, 800, 64, 300, 129]
    check(make_batch(lens, [Group(0, [0, 2, 6, 7], 0, 128)], prefills=[5, 1, 33], padded=[3, 5]))


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_of_query_and_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    batch = make_batch([400, 600, 391], [Group(0, range(3), 0, 384)], dtype=dtype, cache_dtype=cache_dtype)
    check(batch)


def test_without_groups_nothing_is_different() -> None:
    batch = make_batch([300, 20, 600], [], prefills=[4])
    for num_lines in (1, 5):
        some = replace(batch, shared=shared_tensors([], 4, num_lines))
        with memory_filled_with_nan():
            assert torch.equal(some.run(), batch.run_plain())


def test_a_row_in_no_group_does_not_feel_those_of_others() -> None:
    batch = make_batch(SIX, [Group(0, [0, 2, 4], 0, 192)])
    assert torch.equal(batch.run()[1::2], batch.run_plain()[1::2])


def test_a_member_does_not_feel_rows_in_no_group() -> None:
    batch = make_batch([*SIX, 700, 40], CASES["nested"], prefills=[6])
    fewer = replace(
        batch,
        query_THD=batch.query_THD[:7],
        rows_R=batch.rows_R[:6],
        query_start=batch.query_start[:7],
        seq_lens_R=batch.seq_lens_R[:6],
    )
    assert torch.equal(fewer.run()[:6], batch.run()[:6])


def test_under_a_sliding_window_groups_are_ignored() -> None:
    batch = make_batch([500, 300], [Group(0, [0, 1], 0, 256)])
    batch = replace(batch, block_table=batch.known_table)
    assert torch.equal(batch.run(window=100), batch.run_plain(window=100))


def test_a_broken_member_does_not_spoil_the_others() -> None:
    batch = make_batch(SIX, CASES["three levels"])
    expected = batch.run()
    batch.query_THD[4] = float("nan")
    actual = batch.run()
    assert actual[4].isnan().all()
    others = [i for i in range(6) if i != 4]
    assert torch.equal(actual[others], expected[others])


def test_bad_arguments_are_refused() -> None:
    batch = make_batch(SIX, CASES["nested"])
    groups, members, lens = batch.shared
    for shared, message in (
        ((groups, members.long(), lens), "must be int32"),
        ((groups, members), "go together"),
        ((groups.t().contiguous().t(), members, lens), "side by side"),
    ):
        with pytest.raises(Exception, match=message):
            replace(batch, shared=shared).run()


def test_opcheck() -> None:
    batch = make_batch([200, 150], [Group(0, [0, 1], 0, 128)])
    lens = (batch.rows_R, batch.query_start, batch.seq_lens_R)
    arguments = (batch.query_THD, batch.key_cache.nan_to_num(), batch.value_cache.nan_to_num(), batch.known_table)
    torch.library.opcheck(
        torch.ops.toka_triton.paged_attention.default,
        (*arguments, *lens, batch.scale, 0, *batch.shared),
        test_utils=("test_schema", "test_faketensor"),
    )
