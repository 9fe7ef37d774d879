"""Decode rows that share a prefix: attention to it once for all of them (Hydragen) against each row by itself, over the same blocks.

Legend: R rows, one query each; H query heads, D head dim, N blocks, P block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_sections.attention import MAX_OFF
from gpu_sections.measure import Deadline, device_ms

BLOCK_SIZE = 16
GROUP_SLOTS = 16


@dataclass(frozen=True)
class Case:
    """`rows` rows with `prefix` tokens that all of them share and `own` tokens of their own."""

    rows: int
    prefix: int
    own: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"d{self.head_dim}_{self.rows}_share_{self.prefix}_and_{self.own}"


def cases(device: torch.device) -> list[Case]:
    """What is measured, the most telling first."""
    if device.type == "cpu":
        return [Case(rows, 64, 9, num_heads=4, num_kv_heads=2, head_dim=32) for rows in (2, 5)]
    sizes = [
        (256, 2048),
        (1024, 2048),
        (64, 2048),
        (256, 512),
        (256, 4096),
        (1024, 4096),
        (64, 512),
        (64, 4096),
        (1024, 512),
    ]
    return [
        Case(rows, prefix, 128, num_heads=32, num_kv_heads=8, head_dim=head_dim)
        for head_dim in (128, 64)
        for rows, prefix in sizes
    ]


class Problem:
    """A case's tensors: queries, caches with scattered blocks, and what the operator is told of one group of all rows or of none."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype):
        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        blocks_of_prefix, own_blocks = case.prefix // BLOCK_SIZE, -(-case.own // BLOCK_SIZE)
        num_blocks = blocks_of_prefix + case.rows * own_blocks
        shape = (num_blocks, case.num_kv_heads, BLOCK_SIZE, case.head_dim)
        key_cache, value_cache = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        q_RHD = torch.randn(case.rows, case.num_heads, case.head_dim, device=device, dtype=dtype)
        places = torch.randperm(num_blocks, device=device).int()
        prefix = places[:blocks_of_prefix].expand(case.rows, -1)
        block_table = torch.cat([prefix, places[blocks_of_prefix:].view(case.rows, own_blocks)], dim=1)
        starts = torch.arange(case.rows + 1, dtype=torch.int32, device=device)
        seq_lens = torch.full_like(starts[1:], case.prefix + case.own)
        step = (q_RHD, key_cache, value_cache, block_table.contiguous(), starts[:-1], starts, seq_lens)
        self.arguments: tuple[Any, ...] = (*step, case.head_dim**-0.5, 0)

        groups = torch.zeros(GROUP_SLOTS, 5, dtype=torch.int32, device=device)
        self.no_groups = (groups, starts[:-1], torch.zeros_like(seq_lens))
        one_group = groups.clone()
        one_group[0] = ints(0, 0, case.rows, 0, case.prefix)
        self.one_group = (one_group, starts[:-1], torch.full_like(seq_lens, case.prefix))


def toka_attention(problem: Problem, *shared: Tensor) -> Callable[[], Tensor]:
    """The Triton kernels on CUDA, the plain-torch reference on CPU, which makes no use of groups."""
    from toka.kernels.triton.library import load

    on_gpu = problem.arguments[0].is_cuda
    if on_gpu:
        load()
    op = (torch.ops.toka_triton if on_gpu else torch.ops.toka).paged_attention.default
    return lambda: op(*problem.arguments, *shared)


def measure(device: torch.device, deadline: Deadline) -> Iterator[tuple[str, Any]]:
    """Yields for each case the milliseconds row by row, with the group, and with room for groups that is not used.

    Raises at the end if the group changed a result by more than rounding.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    wrong = []
    for case in cases(device):
        if deadline.is_over:
            break
        torch.manual_seed(0)
        problem = Problem(case, device, dtype)
        plain, grouped = toka_attention(problem), toka_attention(problem, *problem.one_group)
        off = float((grouped().float() - plain().float()).abs().max())
        plain_ms, grouped_ms = device_ms(plain, device), device_ms(grouped, device)
        unused_ms = device_ms(toka_attention(problem, *problem.no_groups), device)
        yield (
            case.name,
            {
                "ms": grouped_ms,
                "plain_ms": plain_ms,
                "over_plain": plain_ms / grouped_ms,
                "unused_ms": unused_ms,
                "off": off,
            },
        )
        if off > MAX_OFF[dtype]:
            wrong.append(case.name)
    if wrong:
        raise AssertionError(f"attention by groups differs from attention by rows in {', '.join(wrong)}")
