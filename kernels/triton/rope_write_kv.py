"""`toka_triton::rope_write_kv`: turns queries and keys, and stores keys and values, in one launch.

Legend: T tokens, H heads, D head dim, F = D / 2: the first and the second half of a vector turn together (rotate-half).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import TABLE, capability_of
from toka.kernels.triton.write_kv import as_stored, cache_place, candidates, dense_last, store_in_cache


@triton.jit
def rotate(vectors_ptr, head_H, head_stride, dim_F, mask_HF, cos_F, sin_F, HALF: tl.constexpr):
    """The two turned halves, float32, of the vectors of one token's heads."""
    at_HF = vectors_ptr + head_H[:, None] * head_stride + dim_F[None, :]
    first_HF = tl.load(at_HF, mask=mask_HF, other=0.0).to(tl.float32)
    second_HF = tl.load(at_HF + HALF, mask=mask_HF, other=0.0).to(tl.float32)
    cos_1F, sin_1F = cos_F[None, :], sin_F[None, :]
    return first_HF * cos_1F - second_HF * sin_1F, second_HF * cos_1F + first_HF * sin_1F


@triton.jit
def rope_write_kv_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    turned_ptr,
    num_query_heads,
    num_kv_heads,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cos_token_stride,
    sin_token_stride,
    key_cache_block_stride,
    key_cache_head_stride,
    key_cache_slot_stride,
    value_cache_block_stride,
    value_cache_head_stride,
    value_cache_slot_stride,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    """One program a token and group of heads: first the groups of the KV heads, then those of the query heads."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    num_kv_groups = tl.cdiv(num_kv_heads, HEADS_BLOCK)
    dim_F = tl.arange(0, HALF_BLOCK)
    in_half_F = dim_F < HALF
    cos_F = tl.load(cos_ptr + token * cos_token_stride + dim_F, mask=in_half_F, other=0.0).to(tl.float32)
    sin_F = tl.load(sin_ptr + token * sin_token_stride + dim_F, mask=in_half_F, other=0.0).to(tl.float32)
    if group < num_kv_groups:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            head_H = group * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
            mask_HF = (head_H < num_kv_heads)[:, None] & in_half_F[None, :]
            key_place_H = cache_place(
                slot, head_H, key_cache_block_stride, key_cache_head_stride, key_cache_slot_stride, BLOCK_SIZE
            )
            value_place_H = cache_place(
                slot, head_H, value_cache_block_stride, value_cache_head_stride, value_cache_slot_stride, BLOCK_SIZE
            )
            key_to_HF = key_cache_ptr + key_place_H[:, None] + dim_F[None, :]
            value_to_HF = value_cache_ptr + value_place_H[:, None] + dim_F[None, :]
            token_values_ptr = value_ptr + token * value_token_stride
            value_at_HF = token_values_ptr + head_H[:, None] * value_head_stride + dim_F[None, :]

            first_HF, second_HF = rotate(
                key_ptr + token * key_token_stride, head_H, key_head_stride, dim_F, mask_HF, cos_F, sin_F, HALF
            )
            # Keys are rounded to the activations' dtype first, as an unfused step would.
            first_HF = first_HF.to(key_ptr.dtype.element_ty)
            second_HF = second_HF.to(key_ptr.dtype.element_ty)
            store_in_cache(key_to_HF, first_HF, mask_HF, IS_E4M3)
            store_in_cache(key_to_HF + HALF, second_HF, mask_HF, IS_E4M3)
            store_in_cache(value_to_HF, tl.load(value_at_HF, mask=mask_HF), mask_HF, IS_E4M3)
            store_in_cache(value_to_HF + HALF, tl.load(value_at_HF + HALF, mask=mask_HF), mask_HF, IS_E4M3)
    else:
        head_H = (group - num_kv_groups) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
        mask_HF = (head_H < num_query_heads)[:, None] & in_half_F[None, :]
        first_HF, second_HF = rotate(
            query_ptr + token * query_token_stride, head_H, query_head_stride, dim_F, mask_HF, cos_F, sin_F, HALF
        )
        turned_HF = turned_ptr + (token * num_query_heads + head_H[:, None]) * (2 * HALF) + dim_F[None, :]
        tl.store(turned_HF, first_HF.to(turned_ptr.dtype.element_ty), mask=mask_HF)
        tl.store(turned_HF + HALF, second_HF.to(turned_ptr.dtype.element_ty), mask=mask_HF)


TABLE.declare("rope_write_kv", candidates)


def rope_write_kv(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """As op_schema.py says, turned in float32 and rounded once; the caches may be float8_e4m3fn (see write_kv.py)."""
    num_tokens, num_query_heads, head_dim = query_THD.shape
    num_kv_heads = key_THD.shape[1]
    turned_THD = query_THD.new_empty(query_THD.shape)
    if num_tokens == 0:
        return turned_THD
    query_THD, key_THD, value_THD = dense_last(query_THD), dense_last(key_THD), dense_last(value_THD)
    cos_TF, sin_TF = dense_last(cos_TF), dense_last(sin_TF)
    parameters = TABLE.lookup("rope_write_kv", capability_of(query_THD.device), (head_dim,))
    num_groups = sum(triton.cdiv(heads, parameters["HEADS_BLOCK"]) for heads in (num_kv_heads, num_query_heads))
    rope_write_kv_kernel[(num_tokens, num_groups)](
        query_THD,
        key_THD,
        value_THD,
        cos_TF,
        sin_TF,
        as_stored(key_cache),
        as_stored(value_cache),
        slots_T,
        turned_THD,
        num_query_heads,
        num_kv_heads,
        *query_THD.stride()[:2],
        *key_THD.stride()[:2],
        *value_THD.stride()[:2],
        cos_TF.stride(0),
        sin_TF.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=key_cache.shape[2],
        IS_E4M3=key_cache.dtype == torch.float8_e4m3fn,
        **parameters.keywords,
    )
    return turned_THD


def _compile_case(dtype: str, cache_dtype: str, slot_dtype: str, head_dim: int) -> CompileCase:
    parameters = candidates((9, 0), (head_dim,))[0]
    is_e4m3 = cache_dtype == "e4m3"
    stored = f"*{'u8' if is_e4m3 else cache_dtype}"
    constants = {
        "HALF": head_dim // 2,
        "HALF_BLOCK": triton.next_power_of_2(head_dim // 2),
        "BLOCK_SIZE": 16,
        "IS_E4M3": is_e4m3,
        **dict(parameters.constants),
    }
    activations = ("query_ptr", "key_ptr", "value_ptr", "cos_ptr", "sin_ptr", "turned_ptr")
    types = {
        **dict.fromkeys(activations, f"*{dtype}"),
        "key_cache_ptr": stored,
        "value_cache_ptr": stored,
        "slots_ptr": f"*{slot_dtype}",
    }
    return CompileCase(
        name=f"rope_write_kv {dtype} into {cache_dtype}, head dim {head_dim}",
        kernel=rope_write_kv_kernel,
        signature=signature_of(rope_write_kv_kernel, types, constants),
        constants=constants,
        options=parameters.options,
        unaligned=("num_query_heads", "num_kv_heads"),
    )


COMPILE_CASES = (
    _compile_case("bf16", "bf16", "i32", 64),
    _compile_case("bf16", "bf16", "i32", 128),
    _compile_case("bf16", "e4m3", "i32", 128),
    _compile_case("fp16", "fp16", "i64", 96),
    _compile_case("fp32", "fp32", "i32", 256),
)
