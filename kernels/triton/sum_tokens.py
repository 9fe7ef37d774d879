"""`toka_triton::sum_tokens`: one program a row and piece of the hidden states, which adds token after token.

Legend: R the step's rows, C hidden size, N coordinates of a piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.errors import InvariantError
from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import LaunchParameters
from toka.kernels.triton.write_kv import dense_last

PARAMETERS = LaunchParameters.of(num_warps=1, num_stages=4, BLOCK_N=128)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "query_start_ptr", "seq_lens_ptr"])
def sum_tokens_kernel(
    hidden_ptr,
    rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    sums_ptr,
    hidden_token_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sums is contiguous [M, WIDTH] float32."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    begin, end = tl.load(query_start_ptr + i), tl.load(query_start_ptr + i + 1)
    if (row >= 0) & (begin < end):
        index_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_hidden_N = index_N < WIDTH
        sums_N_ptr = sums_ptr + row * WIDTH + index_N
        sum_N = tl.load(sums_N_ptr, mask=in_hidden_N, other=0.0)
        sum_N = tl.where(tl.load(seq_lens_ptr + i) > end - begin, sum_N, 0.0)
        hidden_N_ptr = hidden_ptr + begin.to(tl.int64) * hidden_token_stride + index_N
        for _ in range(begin, end):
            sum_N += tl.load(hidden_N_ptr, mask=in_hidden_N, other=0.0).to(tl.float32)
            hidden_N_ptr += hidden_token_stride
        tl.store(sums_N_ptr, sum_N, mask=in_hidden_N)


def sum_tokens(hidden_TC: Tensor, rows_R: Tensor, query_start: Tensor, seq_lens_R: Tensor, sums_MC: Tensor) -> None:
    """As `toka::sum_tokens` (op_schema.py)."""
    width = hidden_TC.shape[1]
    if sums_MC.dtype != torch.float32 or sums_MC.shape[1] != width or not sums_MC.is_contiguous():
        raise InvariantError(f"sum_tokens: sums must be contiguous float32 [M, {width}]")
    if any(each.dtype != torch.int32 for each in (rows_R, query_start, seq_lens_R)):
        raise InvariantError("sum_tokens: rows, query_start and seq_lens must be int32")
    hidden_TC = dense_last(hidden_TC)
    if rows_R.shape[0]:
        sum_tokens_kernel[(rows_R.shape[0], triton.cdiv(width, PARAMETERS["BLOCK_N"]))](
            hidden_TC,
            rows_R,
            query_start,
            seq_lens_R,
            sums_MC,
            hidden_TC.stride(0),
            WIDTH=width,
            **PARAMETERS.keywords,
        )


_CONSTANTS = {"WIDTH": 768, **dict(PARAMETERS.constants)}
COMPILE_CASES = [
    CompileCase(
        name="sum_tokens c768 bf16",
        kernel=sum_tokens_kernel,
        signature=signature_of(
            sum_tokens_kernel,
            {
                "hidden_ptr": "*bf16",
                **dict.fromkeys(("rows_ptr", "query_start_ptr", "seq_lens_ptr"), "*i32"),
                "sums_ptr": "*fp32",
            },
            _CONSTANTS,
        ),
        constants=_CONSTANTS,
        options=PARAMETERS.options,
    )
]
