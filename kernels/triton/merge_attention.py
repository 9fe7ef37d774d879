"""`toka_triton::merge_attention`, and the merge of attention states that decode attention shares with it.

Legend: S parts, T tokens, H heads, D head dim; P the parts that one iteration joins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.errors import InvariantError
from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import LaunchParameters

PARAMETERS = LaunchParameters.of(4, 1, max_registers=64, PARTS_BLOCK=16)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_parts(
    weighted_D,
    largest,
    total,
    output_ptr,
    lse_ptr,
    place_P,
    wanted_P,
    output_part_stride,
    lse_part_stride,
    LSE_TO_LOG2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """Add to the joined state of one token and head those parts at place_P that are wanted; to begin with, it is 0, -inf and 0.

    output_ptr, lse_ptr: output [D] and log-sum-exp of the part at place 0, both float32. LSE_TO_LOG2: what turns a log-sum-exp into one
    of base 2. A part without keys (-inf) is not read.
    """
    dim_D = tl.arange(0, DIM_BLOCK)
    lse_P = tl.load(lse_ptr + place_P * lse_part_stride, mask=wanted_P, other=-float("inf")) * LSE_TO_LOG2
    has_keys_P = lse_P != -float("inf")
    output_PD = tl.load(
        output_ptr + place_P[:, None] * output_part_stride + dim_D[None, :],
        mask=has_keys_P[:, None] & (dim_D < HEAD_DIM)[None, :],
        other=0.0,
    )
    new_largest = tl.maximum(largest, tl.max(lse_P, axis=0))
    reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weight_P = tl.exp2(lse_P - reference)
    kept = tl.exp2(largest - reference)
    total = total * kept + tl.sum(weight_P, axis=0)
    weighted_D = weighted_D * kept + tl.sum(weight_P[:, None] * output_PD, axis=0)
    return weighted_D, new_largest, total


@triton.jit
def joined(weighted_D, largest, total):
    """Output (0 where no part has a key) and log-sum-exp of base 2 of the parts that were added."""
    # total >= 1 where any part has a key, since the largest has weight 1; where none has, weighted_D is 0. NaN stays NaN.
    safe_total = tl.where(total == 0.0, 1.0, total)
    return weighted_D / safe_total, largest + tl.log2(safe_total)


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def merge_attention_kernel(
    output_ptr,
    lse_ptr,
    merged_ptr,
    merged_lse_ptr,
    num_parts,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """One program a token and head; all tensors contiguous."""
    place = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    places_per_part = num_tokens.to(tl.int64) * NUM_HEADS
    dim_D = tl.arange(0, DIM_BLOCK)
    weighted_D, largest, total = tl.zeros([DIM_BLOCK], tl.float32), -float("inf"), 0.0
    for first in range(0, num_parts, PARTS_BLOCK):
        part_P = first + tl.arange(0, PARTS_BLOCK)
        weighted_D, largest, total = add_parts(
            weighted_D,
            largest,
            total,
            output_ptr + place * HEAD_DIM,
            lse_ptr + place,
            part_P,
            part_P < num_parts,
            places_per_part * HEAD_DIM,
            places_per_part,
            LOG2_E,
            HEAD_DIM,
            DIM_BLOCK,
        )
    output_D, lse_log2 = joined(weighted_D, largest, total)
    tl.store(merged_ptr + place * HEAD_DIM + dim_D, output_D, mask=dim_D < HEAD_DIM)
    tl.store(merged_lse_ptr + place, lse_log2 / LOG2_E)


def merge_attention(output_STHD: Tensor, lse_STH: Tensor) -> tuple[Tensor, Tensor]:
    """As `toka::merge_attention` (op_schema.py): float32 in and out."""
    num_parts, num_tokens, num_heads, head_dim = output_STHD.shape
    if output_STHD.dtype != torch.float32 or lse_STH.dtype != torch.float32:
        raise InvariantError(f"merge_attention joins float32, not {output_STHD.dtype} and {lse_STH.dtype}")
    merged_THD = output_STHD.new_empty(num_tokens, num_heads, head_dim)
    merged_lse_TH = lse_STH.new_empty(num_tokens, num_heads)
    if num_tokens:
        merge_attention_kernel[(num_tokens, num_heads)](
            output_STHD.contiguous(),
            lse_STH.contiguous(),
            merged_THD,
            merged_lse_TH,
            num_parts,
            num_tokens,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            DIM_BLOCK=triton.next_power_of_2(head_dim),
            **PARAMETERS.keywords,
        )
    return merged_THD, merged_lse_TH


_CONSTANTS = {"NUM_HEADS": 32, "HEAD_DIM": 128, "DIM_BLOCK": 128, **dict(PARAMETERS.constants)}
COMPILE_CASES = [
    CompileCase(
        name="merge_attention d128",
        kernel=merge_attention_kernel,
        signature=signature_of(
            merge_attention_kernel,
            dict.fromkeys(("output_ptr", "lse_ptr", "merged_ptr", "merged_lse_ptr"), "*fp32"),
            _CONSTANTS,
        ),
        constants=_CONSTANTS,
        options=PARAMETERS.options,
    )
]
