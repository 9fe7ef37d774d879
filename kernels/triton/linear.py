"""`toka_triton::linear`: a matrix product in which a row's result is bitwise the same whatever other rows are multiplied with it.

The tile is fixed by the weight's shape, the dtype and the GPU, never by the number of rows, and each program adds up its features in
ascending order, BLOCK_K at a time, without splitting the sum. So the same instructions compute a row alone or among thousands.

Legend: N rows, I in features, O out features; M, K and P: the rows, in features and out features of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters, capability_of

GROUP_SIZE = 8  # tiles of rows that go through the same weights one after the other, so that these stay in the L2 cache


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_row_stride,
    weight_row_stride,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile [BLOCK_M, BLOCK_P] of the result. WIDE: products in float32, since the interpreter can't multiply bfloat16."""
    program = tl.program_id(0)
    num_row_tiles, num_feature_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(OUT_FEATURES, BLOCK_P)
    group = program // (GROUP_SIZE * num_feature_tiles)
    first_tile = group * GROUP_SIZE
    group_size = tl.minimum(num_row_tiles - first_tile, GROUP_SIZE)
    in_group = program % (GROUP_SIZE * num_feature_tiles)
    row_M = (first_tile + in_group % group_size) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature_P = (in_group // group_size) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_K = tl.arange(0, BLOCK_K)

    x_at_MK = x_ptr + row_M.to(tl.int64)[:, None] * x_row_stride + in_K[None, :]
    weight_at_KP = weight_ptr + feature_P.to(tl.int64)[None, :] * weight_row_stride + in_K[:, None]
    is_row_M1, is_feature_1P = (row_M < num_rows)[:, None], (feature_P < OUT_FEATURES)[None, :]
    sum_MP = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for first in range(0, IN_FEATURES, BLOCK_K):
        if IN_FEATURES % BLOCK_K == 0:
            x_MK = tl.load(x_at_MK, mask=is_row_M1, other=0.0)
            weight_KP = tl.load(weight_at_KP, mask=is_feature_1P, other=0.0)
        else:
            is_in_K = first + in_K < IN_FEATURES
            x_MK = tl.load(x_at_MK, mask=is_row_M1 & is_in_K[None, :], other=0.0)
            weight_KP = tl.load(weight_at_KP, mask=is_feature_1P & is_in_K[:, None], other=0.0)
        if WIDE:
            x_MK, weight_KP = x_MK.to(tl.float32), weight_KP.to(tl.float32)
        sum_MP = tl.dot(x_MK, weight_KP, sum_MP, input_precision="ieee")
        x_at_MK += BLOCK_K
        weight_at_KP += BLOCK_K
    if HAS_BIAS:
        sum_MP += tl.load(bias_ptr + feature_P, mask=feature_P < OUT_FEATURES, other=0.0).to(tl.float32)[None, :]
    out_MP = out_ptr + row_M.to(tl.int64)[:, None] * OUT_FEATURES + feature_P[None, :]
    tl.store(out_MP, sum_MP.to(out_ptr.dtype.element_ty), mask=is_row_M1 & is_feature_1P)


def _candidates(capability: Capability, key: Key) -> list[LaunchParameters]:
    """key: (out_features, in_features, dtype). 64 rows are the least that Hopper's and Blackwell's matrix units take in full; a weight with
    few out features comes in narrow tiles, so that there are programs enough to fetch it."""
    out_features, _, dtype = key
    if capability == INTERPRETER:
        return [_tile(4, 1, 16, 64, 64)]
    if dtype == "float32":
        return [_tile(4, 3, 64, 64, 32), _tile(4, 3, 32, 64, 32)]
    wide = _tile(4, 4, 64, 128, 64)
    narrow = _tile(4, 4, 64, 64, 128) if capability >= (9, 0) else _tile(4, 5, 64, 64, 64)
    larger = [_tile(8, 3, 128, 128, 64), _tile(8, 3, 128, 256, 64)] if capability >= (9, 0) else []
    shipped = [wide, narrow] if int(out_features) >= 16_384 else [narrow, wide]
    return [*shipped, _tile(4, 4, 64, 32, 128), *larger]


def _tile(num_warps: int, num_stages: int, rows: int, out_features: int, in_features: int) -> LaunchParameters:
    return LaunchParameters.of(num_warps, num_stages, BLOCK_M=rows, BLOCK_P=out_features, BLOCK_K=in_features)


TABLE.declare("linear", _candidates)


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x · weightᵀ + bias in x's dtype, summed in float32 (products of float32 exact, not tf32)."""
    num_rows, in_features = x_NI.shape
    out_features = weight_OI.shape[0]
    out_NO = x_NI.new_empty((num_rows, out_features))
    if num_rows == 0:
        return out_NO
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    weight_OI = weight_OI if weight_OI.stride(1) == 1 else weight_OI.contiguous()
    key = (out_features, in_features, str(x_NI.dtype).removeprefix("torch."))
    capability = capability_of(x_NI.device)
    parameters = TABLE.lookup("linear", capability, key)
    num_tiles = triton.cdiv(num_rows, parameters["BLOCK_M"]) * triton.cdiv(out_features, parameters["BLOCK_P"])
    linear_kernel[(num_tiles,)](
        x_NI,
        weight_OI,
        weight_OI if bias_O is None else bias_O.contiguous(),
        out_NO,
        num_rows,
        x_NI.stride(0),
        weight_OI.stride(0),
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        HAS_BIAS=bias_O is not None,
        WIDE=capability == INTERPRETER and x_NI.dtype == torch.bfloat16,
        GROUP_SIZE=GROUP_SIZE,
        **parameters.keywords,
    )
    return out_NO


def _compile_case(
    dtype: str, torch_dtype: torch.dtype, out_features: int, in_features: int, has_bias: bool, capability: Capability
) -> CompileCase:
    """With the parameters shipped for this GPU."""
    key = (out_features, in_features, str(torch_dtype).removeprefix("torch."))
    parameters = _candidates(capability, key)[0]
    constants = {
        "OUT_FEATURES": out_features,
        "IN_FEATURES": in_features,
        "HAS_BIAS": has_bias,
        "WIDE": False,
        "GROUP_SIZE": GROUP_SIZE,
        **dict(parameters.constants),
    }
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{dtype}")
    return CompileCase(
        name=f"linear {dtype} {in_features} to {out_features}{', bias' if has_bias else ''}",
        kernel=linear_kernel,
        signature=signature_of(linear_kernel, pointers, constants),
        constants=constants,
        options=parameters.options,
        architectures=(10 * capability[0] + capability[1],),
    )


COMPILE_CASES = tuple(
    _compile_case(*case, capability)
    for capability in ((8, 0), (9, 0), (10, 0))
    for case in (
        ("bf16", torch.bfloat16, 4096, 4096, False),
        ("bf16", torch.bfloat16, 28_672, 4096, False),
        ("fp16", torch.float16, 1152, 896, True),
        ("fp32", torch.float32, 2048, 2048, False),
    )
)
