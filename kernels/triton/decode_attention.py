"""Attention of rows with one query (decode): keys cut into splits, one program each, and the splits' states joined by a second kernel.

Legend: M heads of a group, padded; D head dim, padded; R the step's rows, padded.

Where the cuts are depends on the row's own length and on constants only: splits begin at multiples of SPLIT_TOKENS and are SPLIT_TOKENS
long, or the smallest multiple with which the row has no more than max_splits. So a row's order of summation never depends on what
runs beside it. Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from toka.kernels.triton.merge_attention import merge_parts
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters

KERNEL = "decode_attention"
SPLIT_TOKENS = 256
MAX_SPLITS = 64  # of one row: fills a large device even with one row and few KV heads
MIN_SPLITS_CAP = 8
WORKSPACE_BYTES = 256 << 20  # what the states of all rows may take; with more rows and heads there are fewer splits
# As many as surely fit one at once: they share the items evenly, so a program that has to wait for another would double the time.
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_REGISTERS = 255  # of a thread; a multiprocessor has 2**16
MIN_TILE_ROWS = 16  # what tensor cores multiply at once


@triton.jit
def split_plan(seq_len, WINDOW: tl.constexpr, SPLIT_TOKENS: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """First position, tokens a split, and number of splits of a row (or of many) of at least one token."""
    first = seq_len * 0
    if WINDOW > 0:
        first = tl.maximum(seq_len - WINDOW, 0) // SPLIT_TOKENS * SPLIT_TOKENS
    length = seq_len - first
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
    ROWS_BLOCK: tl.constexpr,
    FP8_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every program takes items in turn; an item is one KV head of one split of one row with a single query.

    A row of one split is written to out [T, H, D]; else each split's state goes to partial [R, H, MAX_SPLITS, D] float32 and
    partial_lse [R, H, MAX_SPLITS] (base 2).
    """
    index_R = tl.arange(0, ROWS_BLOCK)
    in_step_R = index_R < num_rows
    start_R = tl.load(query_start_ptr + index_R, mask=in_step_R, other=0)
    end_R = tl.load(query_start_ptr + index_R + 1, mask=in_step_R, other=0)
    seq_len_R = tl.load(seq_lens_ptr + index_R, mask=in_step_R, other=1)
    _, _, splits_R = split_plan(tl.maximum(seq_len_R, 1), WINDOW, SPLIT_TOKENS, MAX_SPLITS)
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
        first, split_tokens, num_splits = split_plan(seq_len, WINDOW, SPLIT_TOKENS, MAX_SPLITS)
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
        if num_splits == 1:
            place_M = token * (NUM_KV_HEADS * GROUP) + head_M
            out_MD_ptr = out_ptr + place_M[:, None] * HEAD_DIM + dim_D[None, :]
            tl.store(out_MD_ptr, output_MD.to(out_ptr.dtype.element_ty), mask=in_head_MD)
        else:
            place_M = (i.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_M) * MAX_SPLITS + split
            tl.store(partial_ptr + place_M[:, None] * HEAD_DIM + dim_D[None, :], output_MD, mask=in_head_MD)
            tl.store(partial_lse_ptr + place_M, largest_M + tl.log2(total_M), mask=member_M < GROUP)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def combine_splits_kernel(
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """One program a row and query head joins the splits' states, in their order, if the row has one query and several splits."""
    i = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start_ptr + i).to(tl.int64)
    num_queries = tl.load(query_start_ptr + i + 1) - token
    seq_len = tl.maximum(tl.load(seq_lens_ptr + i), 1)
    _, _, num_splits = split_plan(seq_len, WINDOW, SPLIT_TOKENS, MAX_SPLITS)
    if (num_queries == 1) & (num_splits > 1):
        place = (i.to(tl.int64) * NUM_HEADS + head) * MAX_SPLITS
        output_D, _lse = merge_parts(
            partial_ptr + place * HEAD_DIM,
            partial_lse_ptr + place,
            num_splits,
            HEAD_DIM,
            1,
            1.0,
            HEAD_DIM,
            DIM_BLOCK,
            PARTS_BLOCK,
        )
        dim_D = tl.arange(0, DIM_BLOCK)
        out_D_ptr = out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + dim_D
        tl.store(out_D_ptr, output_D.to(out_ptr.dtype.element_ty), mask=dim_D < HEAD_DIM)


def attend_decode_rows(problem: Problem, out_THD: Tensor) -> None:
    """Write the outputs of all rows with one query; others are left alone. out_THD: contiguous [T, H, D]."""
    parameters = TABLE.lookup(KERNEL, problem.capability, problem.key)
    max_splits = most_splits(problem)
    num_rows, num_heads, head_dim = problem.num_rows, problem.num_heads, problem.head_dim
    partial, partial_lse = _states(problem, out_THD.device)
    arguments = problem.arguments()
    constants = {"WINDOW": problem.window, "SPLIT_TOKENS": SPLIT_TOKENS, "MAX_SPLITS": max_splits}
    most_items = num_rows * problem.num_kv_heads * max_splits
    programs = min(most_items, num_programs(out_THD.device, PROGRAMS_PER_MULTIPROCESSOR))
    decode_attention_kernel[(programs,)](
        **arguments | constants,
        out_ptr=out_THD,
        partial_ptr=partial,
        partial_lse_ptr=partial_lse,
        GROUP_BLOCK=group_block(problem.group),
        **parameters.keywords,
    )
    if max_splits > 1:
        combine_splits_kernel[(num_rows, num_heads)](
            partial,
            partial_lse,
            out_THD,
            problem.query_start,
            problem.seq_lens_R,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM_BLOCK=arguments["DIM_BLOCK"],
            **constants,
            **MERGE_PARAMETERS.keywords,
        )


def workspace_bytes(problem: Problem) -> int:
    """Size of the splits' states, which live while the operator runs. The problem's tensors may be on the meta device."""
    return sum(tensor.nbytes for tensor in _states(problem, torch.device("meta")))


def _states(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for every split's output and log-sum-exp; empty where rows are never split."""
    max_splits = most_splits(problem)
    shape = (problem.num_rows, problem.num_heads, max_splits) if max_splits > 1 else (0, 0, 0)
    partial = torch.empty((*shape, problem.head_dim), dtype=torch.float32, device=device)
    return partial, torch.empty(shape, dtype=torch.float32, device=device)


def most_splits(problem: Problem) -> int:
    """Splits that one row can have: by the block table's width or the window, by MAX_SPLITS, and by the workspace.

    The workspace is reckoned with all rows that the block table has, not with the step's, so that the batch decides nothing.
    """
    reach = problem.max_context
    if problem.window > 0:
        reach = min(reach, problem.window + SPLIT_TOKENS)
    bytes_per_split = problem.block_table.shape[0] * problem.num_heads * problem.head_dim * torch.float32.itemsize
    affordable = max(MIN_SPLITS_CAP, WORKSPACE_BYTES // bytes_per_split)
    return min(-(-reach // SPLIT_TOKENS), affordable, MAX_SPLITS)


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
