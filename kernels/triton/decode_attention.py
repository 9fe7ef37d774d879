"""Attention of rows with one query (decode): keys cut into splits, one program each, and the splits' states joined by a second kernel.

Legend: M heads of a group, padded; D head dim, padded; R the step's rows, padded; P parts of a row that are joined at once.

Where the cuts are depends on the row's own length and on constants only: splits begin at multiples of SPLIT_TOKENS and are SPLIT_TOKENS
long, or the smallest multiple with which the row has no more than max_splits. So a row's order of summation never depends on what
runs beside it, unless groups of rows share a prefix: then the splits begin where the shared positions end, and the groups' states
(shared_attention.py) are joined with theirs. Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from toka.kernels.op_schema import MAX_SHARED_LEVELS, SHARED_PREFIX_STEP
from toka.kernels.triton.attention_states import SPLIT_TOKENS, States
from toka.kernels.triton.attention_tile import (
    ANY_ALIGNMENT,
    UNSPECIALISED,
    Problem,
    attend_keys,
    find_row,
    item_bytes,
    num_programs,
    shared_bytes,
)
from toka.kernels.triton.merge_attention import PARAMETERS as MERGE_PARAMETERS
from toka.kernels.triton.merge_attention import add_parts, joined
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters

KERNEL = "decode_attention"
# As many as surely fit one at once: they share the items evenly, so a program that has to wait for another would double the time.
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_REGISTERS = 255  # of a thread; a multiprocessor has 2**16
MIN_TILE_ROWS = 16  # what tensor cores multiply at once
LEVELS = tl.constexpr(MAX_SHARED_LEVELS)
STEP = tl.constexpr(SHARED_PREFIX_STEP)


@triton.jit
def split_plan(shared_len, seq_len, WINDOW: tl.constexpr, SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """First position, tokens a split, and number of splits (at least one) of a row or of many. shared_len: 0 under a window."""
    first = shared_len
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // SPLIT_TOKENS * SPLIT_TOKENS
    length = tl.maximum(seq_len - first, 1)
    tokens = tl.cdiv(tl.cdiv(length, MAX_SPLITS), SPLIT_TOKENS) * SPLIT_TOKENS
    return first, tokens, tl.cdiv(length, tokens)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    block_table_ptr,
    rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    shared_lens_ptr,
    num_rows,
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
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    FP8_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every program takes items in turn; an item is one KV head of one split of one row with a single query.

    A row of one split that shares no position is written to out [T, H, D]; else each split's state goes to partial [R, H, PARTS, D]
    float32 and partial_lse [R, H, PARTS] (base 2). SHARED: whether rows can share positions.
    """
    index_R = tl.arange(0, ROWS_BLOCK)
    in_step_R = index_R < num_rows
    start_R = tl.load(query_start_ptr + index_R, mask=in_step_R, other=0)
    end_R = tl.load(query_start_ptr + index_R + 1, mask=in_step_R, other=0)
    seq_len_R = tl.load(seq_lens_ptr + index_R, mask=in_step_R, other=1)
    shared_len_R = tl.load(shared_lens_ptr + index_R, mask=in_step_R, other=0) if SHARED else index_R * 0
    _, _, splits_R = split_plan(shared_len_R, seq_len_R, WINDOW, SPLIT_TOKENS, MAX_SPLITS)
    splits_R = tl.where(end_R - start_R == 1, splits_R, 0)

    member_M = tl.arange(0, GROUP_BLOCK)
    dim_D = tl.arange(0, DIM_BLOCK)
    in_head_MD = (member_M < GROUP)[:, None] & (dim_D < HEAD_DIM)[None, :]
    num_items = tl.sum(splits_R, 0) * NUM_KV_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head = item % NUM_KV_HEADS
        i, split = find_row(item // NUM_KV_HEADS, splits_R)
        token = tl.load(query_start_ptr + i).to(tl.int64)
        row = tl.load(rows_ptr + i).to(tl.int64)
        seq_len = tl.load(seq_lens_ptr + i)
        shared_len = tl.multiple_of(tl.load(shared_lens_ptr + i), STEP) if SHARED else i * 0
        first, split_tokens, num_splits = split_plan(shared_len, seq_len, WINDOW, SPLIT_TOKENS, MAX_SPLITS)
        begin = first + split * split_tokens

        head_M = kv_head * GROUP + member_M
        query_MD = tl.load(
            query_ptr + token * query_token_stride + head_M[:, None] * query_head_stride + dim_D[None, :],
            mask=in_head_MD,
            other=0.0,
        )
        acc_MD, largest_M, total_M = attend_keys(
            tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32),
            tl.full([GROUP_BLOCK], -float("inf"), tl.float32),
            tl.zeros([GROUP_BLOCK], tl.float32),
            query_MD.to(tl.float32) if WIDE else query_MD,
            tl.full([GROUP_BLOCK], 0, tl.int32) + (seq_len - 1),
            key_ptr + kv_head * key_head_stride,
            value_ptr + kv_head * value_head_stride,
            block_table_ptr + row * table_row_stride,
            begin,
            tl.minimum(begin + split_tokens, seq_len),
            tl.maximum(seq_len - WINDOW, 0) if WINDOW > 0 else 0,
            scale_log2,
            key_block_stride,
            key_token_stride,
            value_block_stride,
            value_token_stride,
            True,
            WINDOW,
            HEAD_DIM,
            DIM_BLOCK,
            BLOCK_SIZE,
            BLOCK_N,
            FP8_BITS,
        )
        output_MD = acc_MD / total_M[:, None]
        if (num_splits == 1) & (shared_len == 0):
            place_M = token * (NUM_KV_HEADS * GROUP) + head_M
            out_MD_ptr = out_ptr + place_M[:, None] * HEAD_DIM + dim_D[None, :]
            tl.store(out_MD_ptr, output_MD.to(out_ptr.dtype.element_ty), mask=in_head_MD)
        else:
            place_M = (i.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_M) * PARTS + split
            tl.store(partial_ptr + place_M[:, None] * HEAD_DIM + dim_D[None, :], output_MD, mask=in_head_MD)
            tl.store(partial_lse_ptr + place_M, largest_M + tl.log2(total_M), mask=member_M < GROUP)


@triton.jit
def parts_of_row(part_P, num_splits, levels_ptr, shared_len, MAX_SPLITS: tl.constexpr, MAX_SHARED_SPLITS: tl.constexpr):
    """How many parts a row has, and where among its states the parts part_P lie, of which the first num_splits are its own.

    levels_ptr: the row's [LEVELS, 2]. What levels say is read at once, and looked at as far as they reach: up to shared_len.
    """
    place_P = part_P
    num_parts = num_splits
    position = 0
    for level in tl.static_range(LEVELS):
        end = tl.load(levels_ptr + level * 2)
        count = tl.load(levels_ptr + level * 2 + 1)
        is_level = position < shared_len
        place_P = tl.where(part_P >= num_parts, part_P - num_parts + MAX_SPLITS + level * MAX_SHARED_SPLITS, place_P)
        num_parts += tl.where(is_level, count, 0)
        position = tl.where(is_level, end, position)
    return num_parts, place_P


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def combine_parts_kernel(
    partial_ptr,
    partial_lse_ptr,
    levels_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    shared_lens_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MAX_SHARED_SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """One program a row and query head joins the parts' states, the splits of the row's own keys first, then level by level those that it
    shares, if the row has one query and its states were left as parts. levels: [R, LEVELS, 2] as `States` says.
    """
    i = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start_ptr + i).to(tl.int64)
    num_queries = tl.load(query_start_ptr + i + 1) - token
    shared_len = tl.load(shared_lens_ptr + i) if SHARED else i * 0
    _, _, num_splits = split_plan(shared_len, tl.load(seq_lens_ptr + i), WINDOW, SPLIT_TOKENS, MAX_SPLITS)
    if (num_queries == 1) & ((num_splits > 1) | (shared_len > 0)):
        dim_D = tl.arange(0, DIM_BLOCK)
        place = (i.to(tl.int64) * NUM_HEADS + head) * PARTS
        weighted_D, largest, total = tl.zeros([DIM_BLOCK], tl.float32), -float("inf"), 0.0
        first, num_parts = 0, num_splits
        while first < num_parts:
            part_P = first + tl.arange(0, PARTS_BLOCK)
            place_P = part_P
            if SHARED:
                num_parts, place_P = parts_of_row(
                    part_P, num_splits, levels_ptr + i * LEVELS * 2, shared_len, MAX_SPLITS, MAX_SHARED_SPLITS
                )
            weighted_D, largest, total = add_parts(
                weighted_D,
                largest,
                total,
                partial_ptr + place * HEAD_DIM,
                partial_lse_ptr + place,
                place_P,
                part_P < num_parts,
                HEAD_DIM,
                1,
                1.0,
                HEAD_DIM,
                DIM_BLOCK,
            )
            first += PARTS_BLOCK
        output_D, _lse = joined(weighted_D, largest, total)
        out_D_ptr = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + dim_D
        tl.store(out_D_ptr, output_D.to(out_ptr.dtype.element_ty), mask=dim_D < HEAD_DIM)


def attend_decode_rows(problem: Problem, states: States, out_THD: Tensor) -> None:
    """Write the outputs of all rows with one query; others are left alone. out_THD: contiguous [T, H, D].

    If the problem shares prefixes, the states of the groups' members must be there.
    """
    parameters = TABLE.lookup(KERNEL, problem.capability, problem.key)
    arguments = problem.arguments()
    shared_lens = problem.seq_lens_R if problem.shared_lens is None else problem.shared_lens  # not read unless SHARED
    shared = {"shared_lens_ptr": shared_lens, "SHARED": problem.shares_prefixes, "PARTS": states.num_parts}
    constants = {"WINDOW": problem.window, "SPLIT_TOKENS": SPLIT_TOKENS, "MAX_SPLITS": states.max_splits}
    most_items = problem.num_rows * problem.num_kv_heads * states.max_splits
    programs = min(most_items, num_programs(out_THD.device, PROGRAMS_PER_MULTIPROCESSOR))
    decode_attention_kernel[(programs,)](
        **arguments | constants | shared,
        out_ptr=out_THD,
        partial_ptr=states.output_RHPD,
        partial_lse_ptr=states.lse_RHP,
        GROUP_BLOCK=group_block(problem.group),
        **parameters.keywords,
    )
    if states.num_parts > 1:
        combine_parts_kernel[(problem.num_rows, problem.num_heads)](
            states.output_RHPD,
            states.lse_RHP,
            states.levels_RL2,
            out_THD,
            problem.query_start,
            problem.seq_lens_R,
            NUM_HEADS=problem.num_heads,
            HEAD_DIM=problem.head_dim,
            DIM_BLOCK=arguments["DIM_BLOCK"],
            MAX_SHARED_SPLITS=states.max_shared_splits,
            **constants,
            **shared,
            **MERGE_PARAMETERS.keywords,
        )


def group_block(group: int) -> int:
    """Tile rows that hold the query heads of one KV head."""
    size: int = triton.next_power_of_2(group)
    return max(MIN_TILE_ROWS, size)


def candidates(capability: Capability, key: Key) -> Sequence[LaunchParameters]:
    """Tiles of about 32 KiB of keys and values, so that two programs fit a multiprocessor, deep enough to cover latency."""
    if capability == INTERPRETER:
        return [LaunchParameters.of(4, 2, BLOCK_N=64)]
    head_dim, _, query_dtype, cache_dtype = key
    num_bytes = max(item_bytes(str(query_dtype)), item_bytes(str(cache_dtype)))
    token_bytes = 2 * triton.next_power_of_2(int(head_dim)) * num_bytes
    tokens = min(128, max(16, (32 << 10) // token_bytes))
    stages = 3 if shared_bytes(capability) > 200 << 10 else 2
    shapes = [
        (tokens, 4, stages),
        (tokens, 4, stages + 1),
        (tokens, 8, stages),
        (tokens, 2, stages),
        (tokens // 2, 4, stages + 2),
        (tokens // 2, 2, stages + 1),
        (tokens * 2, 8, 2),
        (16, 4, 2),
    ]
    return [
        LaunchParameters.of(num_warps, num_stages, max_registers=_registers(num_warps), BLOCK_N=block_n)
        for block_n, num_warps, num_stages in shapes
        if 16 <= block_n <= SPLIT_TOKENS and block_n * token_bytes * num_stages <= shared_bytes(capability)
    ]


def _registers(num_warps: int) -> int:
    """Registers that a thread can have where PROGRAMS_PER_MULTIPROCESSOR programs run at once."""
    return min(MAX_REGISTERS, (1 << 16) // (PROGRAMS_PER_MULTIPROCESSOR * num_warps * 32))


TABLE.declare(KERNEL, candidates)
