"""Attention to prefixes that many rows share: once per group of rows, as a product of all members' queries with the shared keys.

A decode row reads all its keys for a single query, so rows with the same prompt read the same keys again and again. Here a tile holds the
query heads of one KV head of many members, walks over the group's positions without a mask, and leaves a state for each member; the
decode kernel begins after the shared positions and its splits are merged with these states (decode_attention.py).

Legend: G groups, padded; M tile rows (member and head of a KV head's query heads); D head dim, padded.

Where a group is cut depends on all groups of the step: their work is shared out evenly among the device's programs. So a member's order of
summation depends on which groups there are, but on nothing else. Source: Juravsky et al. 2024, "Hydragen: High-throughput LLM inference
with shared prefixes".
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from toka.kernels.op_schema import MAX_SHARED_LEVELS, SHARED_PREFIX_STEP
from toka.kernels.triton import prefill_attention
from toka.kernels.triton.attention_states import SHARED_SPLIT_TOKENS, States
from toka.kernels.triton.attention_tile import (
    ANY_ALIGNMENT,
    UNSPECIALISED,
    Problem,
    attend_keys,
    find_row,
    num_programs,
    rows_block,
)
from toka.kernels.triton.tuning import TABLE, Capability, Key, LaunchParameters

KERNEL = "shared_attention"
PROGRAMS_PER_MULTIPROCESSOR = 1  # all that fits with the shipped tiles: more would only cut groups into more splits
GROUP_COLUMNS = tl.constexpr(5)
STEP = tl.constexpr(SHARED_PREFIX_STEP)
LEAST_STEPS = tl.constexpr(SHARED_SPLIT_TOKENS // SHARED_PREFIX_STEP)
LEVELS = tl.constexpr(MAX_SHARED_LEVELS)


@triton.jit
def shared_plan(num_steps, fair_steps, MAX_SPLITS: tl.constexpr):
    """Steps a split and number of splits of a group (or of many) of num_steps * STEP positions. fair_steps: what a program should get."""
    steps = tl.maximum(tl.maximum(fair_steps, LEAST_STEPS), tl.cdiv(num_steps, MAX_SPLITS))
    return steps, tl.cdiv(num_steps, steps)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def shared_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    partial_ptr,
    partial_lse_ptr,
    levels_ptr,
    block_table_ptr,
    rows_ptr,
    query_start_ptr,
    groups_ptr,
    members_ptr,
    num_groups,
    scale_log2,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    key_token_stride,
    value_block_stride,
    value_head_stride,
    value_token_stride,
    table_row_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MAX_SHARED_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    FP8_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every program takes items in turn; an item is one KV head of one split of one tile of members of one group.

    Writes states as `States` says: partial [R, H, PARTS, D] and partial_lse [R, H, PARTS], both float32, and levels [R, LEVELS, 2].
    """
    TILE_MEMBERS: tl.constexpr = BLOCK_M // GROUP
    index_G = tl.arange(0, GROUPS_BLOCK)
    group_G_ptr = groups_ptr + index_G * GROUP_COLUMNS
    first_G = tl.load(group_G_ptr + 1, mask=index_G < num_groups, other=0)
    end_G = tl.load(group_G_ptr + 2, mask=index_G < num_groups, other=0)
    # Groups end at the first without members; what comes after is left from other steps.
    used_G = index_G < tl.min(tl.where(end_G > first_G, GROUPS_BLOCK, index_G), 0)
    begin_G = tl.load(group_G_ptr + 3, mask=used_G, other=0)
    stop_G = tl.load(group_G_ptr + 4, mask=used_G, other=0)
    steps_G = tl.cdiv(stop_G - begin_G, STEP)
    tiles_G = tl.where(used_G, tl.cdiv(end_G - first_G, TILE_MEMBERS), 0)
    fair_steps = tl.cdiv(tl.sum(tiles_G * steps_G, 0) * NUM_KV_HEADS, tl.num_programs(0))
    _, splits_G = shared_plan(steps_G, fair_steps, MAX_SHARED_SPLITS)
    items_G = tiles_G * splits_G

    index_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, DIM_BLOCK)
    num_items = tl.sum(items_G, 0) * NUM_KV_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head = item % NUM_KV_HEADS
        g, index = find_row(item // NUM_KV_HEADS, items_G)
        group_ptr = groups_ptr + g * GROUP_COLUMNS
        level = tl.load(group_ptr)
        first_member = tl.load(group_ptr + 1)
        end_member = tl.load(group_ptr + 2)
        begin = tl.multiple_of(tl.load(group_ptr + 3), STEP)
        end = tl.multiple_of(tl.load(group_ptr + 4), STEP)
        split_steps, num_splits = shared_plan(tl.cdiv(end - begin, STEP), fair_steps, MAX_SHARED_SPLITS)
        split = index % num_splits
        split_begin = begin + split * split_steps * STEP
        # All members hold the same blocks.
        row = tl.load(rows_ptr + tl.load(members_ptr + first_member)).to(tl.int64)

        member_M = first_member + index // num_splits * TILE_MEMBERS + index_M // GROUP
        in_tile_M = (member_M < end_member) & (index_M < TILE_MEMBERS * GROUP)
        in_tile_MD = in_tile_M[:, None] & (dim_D < HEAD_DIM)[None, :]
        place_M = tl.load(members_ptr + member_M, mask=in_tile_M, other=0)
        token_M = tl.load(query_start_ptr + place_M, mask=in_tile_M, other=0).to(tl.int64)
        head_M = kv_head * GROUP + index_M % GROUP
        query_M_ptr = query_ptr + token_M * query_token_stride + head_M * query_head_stride
        query_MD = tl.load(query_M_ptr[:, None] + dim_D[None, :], mask=in_tile_MD, other=0.0)
        acc_MD, largest_M, total_M = attend_keys(
            tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32),
            tl.full([BLOCK_M], -float("inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            query_MD.to(tl.float32) if WIDE else query_MD,
            index_M,  # positions, which nothing looks at without a mask
            key_ptr + kv_head * key_head_stride,
            value_ptr + kv_head * value_head_stride,
            block_table_ptr + row * table_row_stride,
            split_begin,
            tl.minimum(split_begin + split_steps * STEP, end),
            0,
            scale_log2,
            key_block_stride,
            key_token_stride,
            value_block_stride,
            value_token_stride,
            False,
            0,
            HEAD_DIM,
            DIM_BLOCK,
            BLOCK_SIZE,
            BLOCK_N,
            FP8_BITS,
        )
        # Looked up again, with another filling so that the compiler does not keep what it has: the loop needs the registers.
        place_M = tl.load(members_ptr + member_M, mask=in_tile_M, other=-1)
        part = MAX_SPLITS + level * MAX_SHARED_SPLITS + split
        part_M = (place_M.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_M) * PARTS + part
        tl.store(partial_ptr + part_M[:, None] * HEAD_DIM + dim_D[None, :], acc_MD / total_M[:, None], mask=in_tile_MD)
        tl.store(partial_lse_ptr + part_M, largest_M + tl.log2(total_M), mask=in_tile_M)
        if (kv_head == 0) & (split == 0):
            level_M_ptr = levels_ptr + (place_M * LEVELS + level) * 2
            is_member_M = in_tile_M & (index_M % GROUP == 0)
            tl.store(level_M_ptr, tl.zeros_like(index_M) + end, mask=is_member_M)
            tl.store(level_M_ptr + 1, tl.zeros_like(index_M) + num_splits, mask=is_member_M)


def attend_shared_prefixes(problem: Problem, states: States) -> None:
    """Write the states of every group's members. The problem has room for groups; whether there are any, the device finds out."""
    parameters = TABLE.lookup(KERNEL, problem.capability, problem.key)
    arguments = {name: value for name, value in problem.arguments().items() if name in _TAKEN}
    assert problem.shared_groups is not None and problem.shared_members is not None
    num_groups = problem.shared_groups.shape[0]
    most_items = problem.shared_members.shape[0] * problem.num_kv_heads * states.max_shared_splits
    programs = max(1, min(most_items, num_programs(problem.query_THD.device, PROGRAMS_PER_MULTIPROCESSOR)))
    shared_attention_kernel[(programs,)](
        **arguments,
        partial_ptr=states.output_RHPD,
        partial_lse_ptr=states.lse_RHP,
        levels_ptr=states.levels_RL2,
        groups_ptr=problem.shared_groups,
        members_ptr=problem.shared_members,
        num_groups=num_groups,
        MAX_SPLITS=states.max_splits,
        MAX_SHARED_SPLITS=states.max_shared_splits,
        PARTS=states.num_parts,
        GROUPS_BLOCK=rows_block(num_groups),
        **parameters.keywords,
    )


def candidates(capability: Capability, key: Key) -> Sequence[LaunchParameters]:
    """The tiles of prefill, which multiplies the same matrices; not those whose keys would reach beyond a group's last step."""
    return [
        parameters
        for parameters in prefill_attention.candidates(capability, key)
        if parameters["BLOCK_N"] <= SHARED_PREFIX_STEP
    ]


_TAKEN = frozenset(shared_attention_kernel.arg_names)
TABLE.declare(KERNEL, candidates)
