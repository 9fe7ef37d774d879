"""Attention of one query in parts: how many there can be, and where their states lie between the kernels of one call.

A state is an output in float32 and its log-sum-exp of base 2. A row's parts are the splits of its own keys (decode_attention.py), then,
in steps that can have shared prefixes, the splits of each level of groups that it is a member of (shared_attention.py).

Legend: R the step's rows, H query heads, P parts, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toka.kernels.op_schema import MAX_SHARED_LEVELS
from toka.kernels.triton.attention_tile import Problem

SPLIT_TOKENS = 256
MAX_SPLITS = 64  # of one row: fills a large device even with one row and few KV heads
MIN_SPLITS_CAP = 8
WORKSPACE_BYTES = 256 << 20  # what the states of all rows may take; with more rows and heads there are fewer splits
SHARED_SPLIT_TOKENS = 256  # at least
MAX_SHARED_SPLITS = 16  # of one group: fills a large device with one group of a single tile of members
SHARED_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True)
class States:
    """Room for every part's state; empty where rows have one part, which is the result.

    output_RHPD, lse_RHP: float32. levels_RL2: of each level of a row's groups (the end of its positions, its number of parts), int32;
    undefined from the level on that begins at shared_lens. A row's own parts come first, then those of level 0 from place max_splits on,
    those of level 1 from max_splits + max_shared_splits on, and so forth.
    max_splits: of a row's own keys. max_shared_splits: of one level; 0 = nothing is shared.
    """

    output_RHPD: Tensor
    lse_RHP: Tensor
    levels_RL2: Tensor
    max_splits: int
    max_shared_splits: int

    @property
    def num_parts(self) -> int:
        return self.max_splits + MAX_SHARED_LEVELS * self.max_shared_splits

    @property
    def num_bytes(self) -> int:
        return self.output_RHPD.nbytes + self.lse_RHP.nbytes + self.levels_RL2.nbytes


def states_of(problem: Problem, device: torch.device) -> States:
    """Allocate them, or with device "meta" see what they take; the problem's tensors may be on the meta device."""
    max_splits, max_shared_splits = most_splits(problem), most_shared_splits(problem)
    num_parts = max_splits + MAX_SHARED_LEVELS * max_shared_splits
    shape = (problem.num_rows, problem.num_heads, num_parts) if num_parts > 1 else (0, 0, 0)
    return States(
        torch.empty((*shape, problem.head_dim), dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.empty(
            (problem.num_rows if max_shared_splits else 0, MAX_SHARED_LEVELS, 2), dtype=torch.int32, device=device
        ),
        max_splits,
        max_shared_splits,
    )


def most_splits(problem: Problem) -> int:
    """Splits that one row can have: by the block table's width or the window, by MAX_SPLITS, and by the workspace.

    The workspace is reckoned with all rows that the block table has, not with the step's, so that the batch decides nothing.
    """
    reach = problem.max_context
    if problem.window > 0:
        reach = min(reach, problem.window + SPLIT_TOKENS)
    affordable = max(MIN_SPLITS_CAP, WORKSPACE_BYTES // _bytes_per_split(problem))
    return min(-(-reach // SPLIT_TOKENS), affordable, MAX_SPLITS)


def most_shared_splits(problem: Problem) -> int:
    """Splits that one level of a row's groups can have, likewise; 0 if the step can have no groups."""
    if not problem.shares_prefixes:
        return 0
    affordable = max(1, SHARED_WORKSPACE_BYTES // (MAX_SHARED_LEVELS * _bytes_per_split(problem)))
    return min(-(-problem.max_context // SHARED_SPLIT_TOKENS), affordable, MAX_SHARED_SPLITS)


def _bytes_per_split(problem: Problem) -> int:
    """Of one split of every row that the block table has, log-sum-exps aside."""
    return problem.block_table.shape[0] * problem.num_heads * problem.head_dim * torch.float32.itemsize
