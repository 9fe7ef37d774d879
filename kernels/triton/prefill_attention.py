"""Attention of rows with several queries (prefill): tiles of query tokens over the cached prefix and the new keys alike.

Legend: M tile rows (query token and head of a group), N keys, D head dim, R the step's rows; all padded.

A row's tiles begin at its first query of this step, and each walks over its keys from the left in tiles at multiples of BLOCK_N, so the
result depends on nothing but the row. Source: Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

from collections.abc import Sequence

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
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters

KERNEL = "prefill_attention"
PROGRAMS_PER_MULTIPROCESSOR = 2
HOPPER: Capability = (9, 0)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def prefill_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    block_table_ptr,
    rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    num_rows,
    num_tokens,
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
    WINDOW: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    FP8_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every program takes items in turn; an item is one KV head for one tile of queries of one row with several.

    Tiles are taken from the last to the first, since the last ones of a row see most keys. Also sets out [T, H, D] to zero for the
    tokens that no row owns.
    """
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    index_R = tl.arange(0, ROWS_BLOCK)
    in_step_R = index_R < num_rows
    start_R = tl.load(query_start_ptr + index_R, mask=in_step_R, other=0)
    end_R = tl.load(query_start_ptr + index_R + 1, mask=in_step_R, other=0)
    tiles_R = tl.where(end_R - start_R > 1, tl.cdiv(end_R - start_R, TILE_TOKENS), 0)

    index_M = tl.arange(0, BLOCK_M)
    dim_D = tl.arange(0, DIM_BLOCK)
    num_items = tl.sum(tiles_R, 0) * NUM_KV_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        kv_head = item % NUM_KV_HEADS
        i, tile = find_row((num_items - 1 - item) // NUM_KV_HEADS, tiles_R)
        row = tl.load(rows_ptr + i).to(tl.int64)
        seq_len = tl.load(seq_lens_ptr + i)
        row_start = tl.load(query_start_ptr + i)
        row_end = tl.load(query_start_ptr + i + 1)
        tile_start = row_start + tile * TILE_TOKENS
        tile_end = tl.minimum(tile_start + TILE_TOKENS, row_end)
        first_position = seq_len - row_end + tile_start

        token_M = tile_start + index_M // GROUP
        head_M = kv_head * GROUP + index_M % GROUP
        in_tile_MD = ((token_M < tile_end) & (index_M < TILE_TOKENS * GROUP))[:, None] & (dim_D < HEAD_DIM)[None, :]
        query_M_ptr = query_ptr + token_M.to(tl.int64) * query_token_stride + head_M * query_head_stride
        query_MD = tl.load(query_M_ptr[:, None] + dim_D[None, :], mask=in_tile_MD, other=0.0)
        position_M = first_position + index_M // GROUP

        # Below full_end every query of the tile sees every key, unless there is a window.
        keys_end = first_position + tile_end - tile_start
        if WINDOW > 0:
            first_visible = tl.maximum(first_position - WINDOW + 1, 0)
            full_end = first_visible // BLOCK_N * BLOCK_N
        else:
            first_visible = 0
            full_end = (first_position + 1) // BLOCK_N * BLOCK_N
        acc_MD = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
        largest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total_M = tl.zeros([BLOCK_M], tl.float32)
        for MASKED in tl.static_range(2):
            if MASKED or WINDOW == 0:
                acc_MD, largest_M, total_M = attend_keys(
                    acc_MD,
                    largest_M,
                    total_M,
                    query_MD.to(tl.float32) if WIDE else query_MD,
                    position_M,
                    key_ptr + kv_head * key_head_stride,
                    value_ptr + kv_head * value_head_stride,
                    block_table_ptr + row * table_row_stride,
                    full_end if MASKED else 0,
                    keys_end if MASKED else full_end,
                    first_visible,
                    scale_log2,
                    key_block_stride,
                    key_token_stride,
                    value_block_stride,
                    value_token_stride,
                    MASKED,
                    WINDOW,
                    HEAD_DIM,
                    DIM_BLOCK,
                    BLOCK_SIZE,
                    BLOCK_N,
                    FP8_BITS,
                )
        out_M_ptr = out_ptr + (token_M.to(tl.int64) * NUM_HEADS + head_M) * HEAD_DIM
        output_MD = (acc_MD / total_M[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_M_ptr[:, None] + dim_D[None, :], output_MD, mask=in_tile_MD)

    num_owned = tl.load(query_start_ptr + num_rows).to(tl.int64)
    zero_D = tl.zeros([DIM_BLOCK], out_ptr.dtype.element_ty)
    for token in range(num_owned + tl.program_id(0), num_tokens, tl.num_programs(0)):
        for head in range(NUM_HEADS):
            place = token * NUM_HEADS + head
            tl.store(out_ptr + place * HEAD_DIM + dim_D, zero_D, mask=dim_D < HEAD_DIM)


def attend_prefill_rows(problem: Problem, out_THD: Tensor) -> None:
    """Write the outputs of all rows with several queries, and zeros for tokens of no row. out_THD: contiguous [T, H, D]."""
    parameters = TABLE.lookup(KERNEL, problem.capability, problem.key)
    most_tiles = triton.cdiv(problem.num_tokens, parameters["BLOCK_M"] // problem.group) + problem.num_rows
    programs = min(most_tiles * problem.num_kv_heads, num_programs(out_THD.device, PROGRAMS_PER_MULTIPROCESSOR))
    prefill_attention_kernel[(programs,)](
        **problem.arguments(), out_ptr=out_THD, num_tokens=problem.num_tokens, **parameters.keywords
    )


def candidates(capability: Capability, key: Key) -> Sequence[LaunchParameters]:
    """Tiles as FlashAttention-2 has them: 128 query rows for 16-bit numbers and heads up to 128, fewer where registers run out."""
    head_dim, group, query_dtype, cache_dtype = (str(part) for part in key)
    dim, group_rows = triton.next_power_of_2(int(head_dim)), triton.next_power_of_2(int(group))
    if capability == INTERPRETER:
        return [LaunchParameters.of(4, 2, BLOCK_M=max(32, group_rows), BLOCK_N=64)]
    # Ampere spills at 64 keys if it must also fill up heads with zeros or take FP8 apart.
    crowded = capability < HOPPER and (dim != int(head_dim) or item_bytes(cache_dtype) == 1)
    num_bytes = max(item_bytes(query_dtype), item_bytes(cache_dtype))
    if num_bytes == 4:
        tiles = [(32, 32, 4), (16, 32, 4), (16, 16, 4)]
    elif dim > 128:
        tiles = [(64, 32, 8), (64, 64, 8), (64, 16, 4), (16, 16, 4)]
    else:
        tiles = [(128, 32 if crowded else 64, 8), (64, 64, 4), (128, 128, 8), (64, 32, 4), (128, 32, 8)]
    stages = 3 if shared_bytes(capability) > 200 << 10 and num_bytes < 4 else 2
    return [
        LaunchParameters.of(num_warps, num_stages, BLOCK_M=max(rows, group_rows), BLOCK_N=tokens)
        for num_stages in (stages, 2)
        for rows, tokens, num_warps in tiles
        if (max(rows, group_rows) + 2 * tokens * num_stages) * dim * num_bytes <= shared_bytes(capability)
    ]


TABLE.declare(KERNEL, candidates)
