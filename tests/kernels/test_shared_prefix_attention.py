"""Attention over shared prefixes on CPUs: to the bit what each row gets by itself, whatever the groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toka.kernels.op_schema import MAX_SHARED_LEVELS, SHARED_PREFIX_STEP

pytestmark = pytest.mark.usefixtures("cpp_kernels")

NUM_KV_HEADS, GROUP, BLOCK_SIZE = 2, 3, 16
NUM_BLOCKS = 4096


@dataclass(frozen=True)
class Group:
    """Rows members[...] share positions [begin, end)."""

    level: int
    members: list[int]
    begin: int
    end: int


def step(
    seq_lens: list[int], groups: list[Group], head_dim: int = 64, dtype: torch.dtype = torch.float32
) -> list[object]:
    """Arguments of a step of one query a row over a cache in which the groups' rows hold the same blocks."""
    random = torch.Generator().manual_seed(0)
    num_rows, num_heads = len(seq_lens), NUM_KV_HEADS * GROUP
    width = -(-max(seq_lens) // BLOCK_SIZE)
    free = torch.randperm(NUM_BLOCKS, generator=random, dtype=torch.int32)
    table = free[: num_rows * width].view(num_rows, width).clone()
    for group in groups:
        columns = slice(group.begin // BLOCK_SIZE, group.end // BLOCK_SIZE)
        table[group.members, columns] = table[group.members[0], columns].clone()
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, head_dim)
    caches = [torch.randn(shape, generator=random).to(dtype) for _ in range(2)]
    query_RHD = torch.randn(num_rows, num_heads, head_dim, generator=random).to(dtype)
    starts, lens = torch.arange(num_rows + 1, dtype=torch.int32), torch.tensor(seq_lens, dtype=torch.int32)
    return [query_RHD, *caches, table, starts[:-1], starts, lens, head_dim**-0.5, 0]


def shared(groups: list[Group], num_rows: int, num_slots: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    table, members = torch.zeros(num_slots, 5, dtype=torch.int32), torch.zeros(num_slots * 64, dtype=torch.int32)
    lens, used = torch.zeros(num_rows, dtype=torch.int32), 0
    for i, group in enumerate(groups):
        table[i] = torch.tensor([group.level, used, used + len(group.members), group.begin, group.end])
        members[used : used + len(group.members)] = torch.tensor(group.members, dtype=torch.int32)
        lens[group.members] = group.end
        used += len(group.members)
    return table, members, lens


EVERY_OTHER = list(range(0, 50, 2))
CASES = {
    "all rows": [Group(0, list(range(50)), 0, 512)],
    "stops inside of a split": [Group(0, list(range(50)), 0, 320)],
    "not side by side": [Group(0, EVERY_OTHER, 0, 448)],
    "two groups": [Group(0, EVERY_OTHER, 0, 448), Group(0, list(range(1, 50, 2)), 0, 64)],
    "nested": [
        Group(0, list(range(40)), 0, 192),
        Group(1, list(range(7, 25)), 192, 448),
        Group(1, list(range(25, 40)), 192, 256),
    ],
    "three levels": [
        Group(0, list(range(50)), 0, 256),
        Group(1, EVERY_OTHER, 256, 320),
        Group(2, EVERY_OTHER[3:9], 320, 576),
    ],
    "one member": [Group(0, [5], 0, 128)],
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_groups_change_nothing(name: str, threads: int) -> None:
    seq_lens = [600 + 13 * i for i in range(50)]
    arguments = step(seq_lens, CASES[name])
    expected = torch.ops.toka_cpp.paged_attention(*arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = torch.ops.toka_cpp.paged_attention(*arguments, *shared(CASES[name], len(seq_lens)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual, expected)
    reference = torch.ops.toka.paged_attention(*arguments, *shared(CASES[name], len(seq_lens)))
    torch.testing.assert_close(actual, reference, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 72, 128, 256])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    groups = CASES["nested"]
    arguments = step([700] * 50, groups, head_dim, dtype)
    expected = torch.ops.toka_cpp.paged_attention(*arguments)
    assert torch.equal(torch.ops.toka_cpp.paged_attention(*arguments, *shared(groups, 50)), expected)


def test_a_row_with_one_position_of_its_own() -> None:
    groups = [Group(0, [0, 1, 2], 0, 256)]
    arguments = step([257, 300, 1000], groups)
    expected = torch.ops.toka_cpp.paged_attention(*arguments)
    assert torch.equal(torch.ops.toka_cpp.paged_attention(*arguments, *shared(groups, 3)), expected)


def test_the_shared_blocks_are_read_through_the_group_alone() -> None:
    """Were the groups ignored, members that hold no blocks of the prefix of their own would be refused."""
    groups = [Group(0, list(range(20)), 0, 512)]
    arguments = step([600] * 20, groups)
    expected = torch.ops.toka_cpp.paged_attention(*arguments)
    table = arguments[3]
    assert isinstance(table, Tensor)
    table[1:, : 512 // BLOCK_SIZE] = -1
    assert torch.equal(torch.ops.toka_cpp.paged_attention(*arguments, *shared(groups, 20, num_slots=2)), expected)
    with pytest.raises(RuntimeError, match="block outside of the cache"):
        torch.ops.toka_cpp.paged_attention(*arguments)


def test_under_a_sliding_window_groups_are_ignored() -> None:
    groups = CASES["all rows"]
    arguments = step([600] * 50, groups)
    arguments[-1] = 100
    expected = torch.ops.toka_cpp.paged_attention(*arguments)
    assert torch.equal(torch.ops.toka_cpp.paged_attention(*arguments, *shared(groups, 50)), expected)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group(MAX_SHARED_LEVELS, [0, 1], 0, 64)], "a level of 3"),
        ([Group(0, [0, 1], 0, 65)], f"steps of {SHARED_PREFIX_STEP}"),
        ([Group(0, [0, 1], 64, 64)], "must ascend"),
        ([Group(0, [0, 4], 0, 64)], "place 4 is not in the batch"),
        ([Group(0, [0, 1], 0, 128)], "no position of its own left"),
        ([Group(0, [0, 1], 64, 128)], "no position of its own left"),
        ([Group(1, [2, 3], 64, 128)], "follow one another from position 0"),
        ([Group(0, [2, 3], 0, 64), Group(0, [2, 3], 0, 64)], "follow one another from position 0"),
    ],
    ids=str,
)
def test_bad_groups_are_refused(groups: list[Group], message: str, cpp_kernels: Path) -> None:
    arguments = step([128, 128, 200, 200], [])
    tensors = list(shared([], 4))
    used = 0
    for i, group in enumerate(groups):
        tensors[0][i] = torch.tensor([group.level, used, used + 2, group.begin, group.end])
        tensors[1][used : used + 2] = torch.tensor(group.members)
        used += 2
    with pytest.raises(RuntimeError, match=message):
        torch.ops.toka_cpp.paged_attention(*arguments, *tensors)
    assert torch.ops.toka_cpp.paged_attention(*arguments).shape == (4, NUM_KV_HEADS * GROUP, 64)
