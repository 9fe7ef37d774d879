"""`toka_triton::encoder_attention`: attention in which every token of a row sees all of the row, over the step's own keys.

Legend: M queries of a tile, N keys of a tile, D head dim, R the step's rows; all padded.

Programs share out the tiles of all rows as prefill_attention.py does. Each tile walks over its row's keys from the first one in tiles of
BLOCK_N, so the result depends on nothing but the row. Source: Dao 2023, "FlashAttention-2".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.errors import InvariantError
from toka.kernels.triton.attention_tile import (
    LOG2_E,
    dtype_name,
    find_row,
    item_bytes,
    num_programs,
    rows_block,
    shared_bytes,
)
from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters, capability_of

KERNEL = "encoder_attention"
PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit(do_not_specialize=["num_rows", "num_tokens"], do_not_specialize_on_alignment=["query_start_ptr"])
def encoder_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    query_start_ptr,
    num_rows,
    num_tokens,
    scale_log2,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every program takes items in turn; an item is one head for one tile of a row's queries.

    Scores have base 2. Also sets out [T, H, D] to zero for the tokens that no row owns. WIDE: products in float32.
    """
    index_R = tl.arange(0, ROWS_BLOCK)
    in_step_R = index_R < num_rows
    start_R = tl.load(query_start_ptr + index_R, mask=in_step_R, other=0)
    end_R = tl.load(query_start_ptr + index_R + 1, mask=in_step_R, other=0)
    tiles_R = tl.cdiv(end_R - start_R, BLOCK_M)

    dim_D = tl.arange(0, DIM_BLOCK)
    in_head_D = dim_D < HEAD_DIM
    num_items = tl.sum(tiles_R, 0) * NUM_HEADS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        head = item % NUM_HEADS
        i, tile = find_row(item // NUM_HEADS, tiles_R)
        row_start = tl.load(query_start_ptr + i)
        row_end = tl.load(query_start_ptr + i + 1)
        token_M = row_start + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_tile_MD = (token_M < row_end)[:, None] & in_head_D[None, :]
        query_M_ptr = query_ptr + token_M.to(tl.int64) * query_token_stride + head * query_head_stride
        query_MD = tl.load(query_M_ptr[:, None] + dim_D[None, :], mask=in_tile_MD, other=0.0)
        if WIDE:
            query_MD = query_MD.to(tl.float32)

        acc_MD = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
        largest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total_M = tl.zeros([BLOCK_M], tl.float32)
        for start in range(row_start, row_end, BLOCK_N):
            token_N = start + tl.arange(0, BLOCK_N)
            in_row_N = token_N < row_end
            key_N_ptr = key_ptr + token_N.to(tl.int64) * key_token_stride + head * key_head_stride
            key_DN = tl.load(
                key_N_ptr[None, :] + dim_D[:, None], mask=in_row_N[None, :] & in_head_D[:, None], other=0.0
            )
            score_MN = tl.dot(query_MD, key_DN.to(query_MD.dtype), input_precision="tf32x3") * scale_log2
            score_MN = tl.where(in_row_N[None, :], score_MN, -float("inf"))  # a tile has one key at least

            new_largest_M = tl.maximum(largest_M, tl.max(score_MN, 1))
            weight_MN = tl.exp2(score_MN - new_largest_M[:, None])
            kept_M = tl.exp2(largest_M - new_largest_M)
            total_M = total_M * kept_M + tl.sum(weight_MN, 1)
            largest_M = new_largest_M

            value_N_ptr = value_ptr + token_N.to(tl.int64) * value_token_stride + head * value_head_stride
            value_ND = tl.load(
                value_N_ptr[:, None] + dim_D[None, :], mask=in_row_N[:, None] & in_head_D[None, :], other=0.0
            ).to(query_MD.dtype)
            acc_MD = tl.dot(weight_MN.to(value_ND.dtype), value_ND, acc_MD * kept_M[:, None], input_precision="tf32x3")
        out_M_ptr = out_ptr + (token_M.to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
        output_MD = (acc_MD / total_M[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_M_ptr[:, None] + dim_D[None, :], output_MD, mask=in_tile_MD)

    num_owned = tl.load(query_start_ptr + num_rows).to(tl.int64)
    zero_D = tl.zeros([DIM_BLOCK], out_ptr.dtype.element_ty)
    for token in range(num_owned + tl.program_id(0), num_tokens, tl.num_programs(0)):
        for head in range(NUM_HEADS):
            tl.store(out_ptr + (token * NUM_HEADS + head) * HEAD_DIM + dim_D, zero_D, mask=in_head_D)


def encoder_attention(
    query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, query_start: Tensor, scale: float
) -> Tensor:
    """As `toka::encoder_attention` (op_schema.py)."""
    if not query_THD.shape == key_THD.shape == value_THD.shape or query_start.dtype != torch.int32:
        raise InvariantError("encoder_attention: query, keys and values must be of one shape, query_start int32")
    if any(each.stride(2) != 1 for each in (query_THD, key_THD, value_THD)):
        raise InvariantError("encoder_attention: the numbers of one head must lie side by side")
    num_tokens, num_heads, head_dim = query_THD.shape
    out_THD = query_THD.new_empty(query_THD.shape)
    capability, num_rows = capability_of(query_THD.device), query_start.shape[0] - 1
    parameters = TABLE.lookup(KERNEL, capability, (head_dim, dtype_name(query_THD.dtype)))
    most_tiles = triton.cdiv(num_tokens, parameters["BLOCK_M"]) + num_rows
    programs = min(most_tiles * num_heads, num_programs(query_THD.device, PROGRAMS_PER_MULTIPROCESSOR))
    encoder_attention_kernel[(programs,)](
        query_THD,
        key_THD,
        value_THD,
        out_THD,
        query_start,
        num_rows,
        num_tokens,
        scale * LOG2_E,
        query_THD.stride(0),
        query_THD.stride(1),
        key_THD.stride(0),
        key_THD.stride(1),
        value_THD.stride(0),
        value_THD.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM_BLOCK=_dim_block(head_dim),
        ROWS_BLOCK=rows_block(num_rows),
        WIDE=capability == INTERPRETER and query_THD.dtype == torch.bfloat16,
        **parameters.keywords,
    )
    return out_THD


def _dim_block(head_dim: int) -> int:
    block: int = max(16, triton.next_power_of_2(head_dim))
    return block


def candidates(capability: Capability, key: Key) -> Sequence[LaunchParameters]:
    """key: (head_dim, dtype). Tiles as FlashAttention-2 has them, as large as shared memory allows."""
    dim, num_bytes = _dim_block(int(key[0])), item_bytes(str(key[1]))
    if capability == INTERPRETER:
        return [LaunchParameters.of(4, 2, BLOCK_M=32, BLOCK_N=32)]
    if num_bytes == 4:
        tiles = [(32, 32, 4), (16, 32, 4), (16, 16, 4)]
    elif dim > 128:
        tiles = [(64, 32, 8), (64, 16, 4), (16, 16, 4)]
    else:
        tiles = [(128, 64, 8), (64, 64, 4), (64, 32, 4)]
    return [
        LaunchParameters.of(num_warps, 2, BLOCK_M=rows, BLOCK_N=tokens)
        for rows, tokens, num_warps in tiles
        if (rows + 4 * tokens) * dim * num_bytes <= shared_bytes(capability)
    ]


TABLE.declare(KERNEL, candidates)


def _case(head_dim: int, num_heads: int, dtype: torch.dtype, name: str, capability: Capability) -> CompileCase:
    parameters = candidates(capability, (head_dim, dtype_name(dtype)))[0]
    constants = {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "DIM_BLOCK": _dim_block(head_dim),
        "ROWS_BLOCK": 128,
        "WIDE": False,
        **dict(parameters.constants),
    }
    types = {
        **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), f"*{name}"),
        "query_start_ptr": "*i32",
        "scale_log2": "fp32",
    }
    return CompileCase(
        name=f"encoder_attention d{head_dim} {name}",
        kernel=encoder_attention_kernel,
        signature=signature_of(encoder_attention_kernel, types, constants),
        constants=constants,
        options=parameters.options,
        architectures=(10 * capability[0] + capability[1],),
    )


COMPILE_CASES = [
    _case(head_dim, num_heads, dtype, name, capability)
    for capability in ((8, 0), (9, 0), (10, 0))
    for head_dim, num_heads, dtype, name in (
        (32, 12, torch.float32, "fp32"),  # MiniLM
        (64, 12, torch.bfloat16, "bf16"),  # BERT base
    )
]
