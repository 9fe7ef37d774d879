"""`toka_triton::write_kv`, and the store into the paged cache that rope_write_kv.py shares with it.

Legend: T tokens, H KV heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters, capability_of

_LARGEST_E4M3 = tl.constexpr(448.0)
_SMALLEST_NORMAL_E4M3 = tl.constexpr(2.0**-6)
_STEP_BELOW_NORMAL = tl.constexpr(
    2.0**14
)  # adding it leaves a float32's mantissa in steps of 2**-9, as e4m3 has below 2**-6


@triton.jit
def to_e4m3_bits(x):
    """Any float → the bits of float8_e4m3fn as uint8: to nearest even, beyond ±448 the largest, NaN stays NaN.

    In integers, since GPUs before compute capability 8.9 have no such conversion. Infinities become the largest too.
    """
    x = x.to(tl.float32)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), _LARGEST_E4M3)
    magnitude_bits = magnitude.to(tl.uint32, bitcast=True)
    # 23 bits of mantissa become 3, and the exponent's bias of 127 becomes 7.
    normal = ((magnitude_bits + 0x7FFFF + ((magnitude_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    below = (magnitude + _STEP_BELOW_NORMAL).to(tl.uint32, bitcast=True) & 0xFF
    rounded = tl.where(magnitude < _SMALLEST_NORMAL_E4M3, below, normal)
    return (tl.where(x == x, rounded, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_in_cache(pointers, x, mask, IS_E4M3: tl.constexpr):
    """Store floats in the cache's dtype; an e4m3 cache is seen as uint8."""
    if IS_E4M3:
        tl.store(pointers, to_e4m3_bits(x), mask=mask)
    else:
        # By way of float32, which holds every value of either side.
        tl.store(pointers, x.to(tl.float32).to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def cache_place(slot, head_H, block_stride, head_stride, slot_stride, BLOCK_SIZE: tl.constexpr):
    """Where the vectors of these heads stand in a cache [num_blocks, H, BLOCK_SIZE, D], in elements (int64)."""
    block = slot // BLOCK_SIZE
    return block * block_stride + head_H.to(tl.int64) * head_stride + (slot % BLOCK_SIZE) * slot_stride


@triton.jit
def write_kv_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    num_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    key_cache_block_stride,
    key_cache_head_stride,
    key_cache_slot_stride,
    value_cache_block_stride,
    value_cache_head_stride,
    value_cache_slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    """One program a token and group of heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        head_H = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
        dim_D = tl.arange(0, DIM_BLOCK)
        mask_HD = (head_H < num_heads)[:, None] & (dim_D < HEAD_DIM)[None, :]
        key_at = key_ptr + token * key_token_stride + head_H[:, None] * key_head_stride + dim_D[None, :]
        value_at = value_ptr + token * value_token_stride + head_H[:, None] * value_head_stride + dim_D[None, :]
        key_HD = tl.load(key_at, mask=mask_HD)
        value_HD = tl.load(value_at, mask=mask_HD)
        key_place_H = cache_place(
            slot, head_H, key_cache_block_stride, key_cache_head_stride, key_cache_slot_stride, BLOCK_SIZE
        )
        value_place_H = cache_place(
            slot, head_H, value_cache_block_stride, value_cache_head_stride, value_cache_slot_stride, BLOCK_SIZE
        )
        store_in_cache(key_cache_ptr + key_place_H[:, None] + dim_D[None, :], key_HD, mask_HD, IS_E4M3)
        store_in_cache(value_cache_ptr + value_place_H[:, None] + dim_D[None, :], value_HD, mask_HD, IS_E4M3)


def as_stored(cache: Tensor) -> Tensor:
    """The cache as the kernels store into it: float8_e4m3fn as bytes."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def dense_last(x: Tensor) -> Tensor:
    """x, or a copy if the elements of a vector do not stand side by side; slices of a merged product need none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def candidates(capability: Capability, key: Key) -> list[LaunchParameters]:
    """key: (head_dim,). The interpreter takes all heads at once, as it pays by the program."""
    if capability == INTERPRETER:
        return [LaunchParameters.of(4, 1, HEADS_BLOCK=16)]
    return [
        LaunchParameters.of(num_warps, 1, HEADS_BLOCK=heads) for num_warps, heads in ((4, 8), (4, 16), (2, 4), (1, 2))
    ]


TABLE.declare("write_kv", candidates)


def write_kv(key_THD: Tensor, value_THD: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> None:
    """As op_schema.py says; the caches may also be float8_e4m3fn, where numbers beyond ±448 are stored as ±448."""
    num_tokens, num_heads, head_dim = key_THD.shape
    if num_tokens == 0:
        return
    key_THD, value_THD = dense_last(key_THD), dense_last(value_THD)
    parameters = TABLE.lookup("write_kv", capability_of(key_THD.device), (head_dim,))
    write_kv_kernel[(num_tokens, triton.cdiv(num_heads, parameters["HEADS_BLOCK"]))](
        key_THD,
        value_THD,
        as_stored(key_cache),
        as_stored(value_cache),
        slots_T,
        num_heads,
        *key_THD.stride()[:2],
        *value_THD.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        HEAD_DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=key_cache.shape[2],
        IS_E4M3=key_cache.dtype == torch.float8_e4m3fn,
        **parameters.keywords,
    )


def _compile_case(dtype: str, cache_dtype: str, slot_dtype: str, head_dim: int) -> CompileCase:
    parameters = candidates((9, 0), (head_dim,))[0]
    is_e4m3 = cache_dtype == "e4m3"
    stored = f"*{'u8' if is_e4m3 else cache_dtype}"
    constants = {
        "HEAD_DIM": head_dim,
        "DIM_BLOCK": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": 16,
        "IS_E4M3": is_e4m3,
        **dict(parameters.constants),
    }
    types = {
        "key_ptr": f"*{dtype}",
        "value_ptr": f"*{dtype}",
        "key_cache_ptr": stored,
        "value_cache_ptr": stored,
        "slots_ptr": f"*{slot_dtype}",
    }
    return CompileCase(
        name=f"write_kv {dtype} into {cache_dtype}, head dim {head_dim}",
        kernel=write_kv_kernel,
        signature=signature_of(write_kv_kernel, types, constants),
        constants=constants,
        options=parameters.options,
        unaligned=("num_heads",),
    )


COMPILE_CASES = (
    _compile_case("bf16", "bf16", "i32", 64),
    _compile_case("bf16", "e4m3", "i32", 128),
    _compile_case("fp16", "fp16", "i64", 96),
    _compile_case("fp32", "fp32", "i32", 256),
)
