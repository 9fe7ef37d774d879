"""`toka_triton::sparse_logits`: dot products of hidden states with chosen rows of the head.

Legend: N hidden states, C hidden size, V vocabulary, K ids of a hidden state; I the ids and H the channels of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters, capability_of


@triton.jit(do_not_specialize=["num_ids"])
def sparse_logits_kernel(
    hidden_ptr,
    weight_ptr,
    ids_ptr,
    out_ptr,
    num_ids,
    hidden_row_stride,
    weight_row_stride,
    HIDDEN_SIZE: tl.constexpr,
    IDS_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
):
    """One program a hidden state and group of ids; sums in float32, in one order."""
    n = tl.program_id(0).to(tl.int64)
    place_I = tl.program_id(1) * IDS_BLOCK + tl.arange(0, IDS_BLOCK)
    id_I = tl.load(ids_ptr + n * num_ids + place_I, mask=place_I < num_ids, other=-1)
    weight_row_I = id_I.to(tl.int64) * weight_row_stride
    sum_IH = tl.zeros([IDS_BLOCK, HIDDEN_BLOCK], tl.float32)
    for first in range(0, HIDDEN_SIZE, HIDDEN_BLOCK):
        channel_H = first + tl.arange(0, HIDDEN_BLOCK)
        is_channel_H = channel_H < HIDDEN_SIZE
        hidden_H = tl.load(hidden_ptr + n * hidden_row_stride + channel_H, mask=is_channel_H, other=0.0)
        weight_IH = tl.load(
            weight_ptr + weight_row_I[:, None] + channel_H[None, :],
            mask=(id_I >= 0)[:, None] & is_channel_H[None, :],
            other=0.0,
        )
        sum_IH += weight_IH.to(tl.float32) * hidden_H.to(tl.float32)[None, :]
    logit_I = tl.where(id_I >= 0, tl.sum(sum_IH, axis=1), float("-inf"))
    tl.store(out_ptr + n * num_ids + place_I, logit_I, mask=place_I < num_ids)


def _candidates(capability: Capability, key: Key) -> list[LaunchParameters]:
    """key: (hidden_size, dtype)."""
    if capability == INTERPRETER:
        return [LaunchParameters.of(4, 1, IDS_BLOCK=16, HIDDEN_BLOCK=64)]
    return [
        LaunchParameters.of(4, 1, IDS_BLOCK=ids, HIDDEN_BLOCK=hidden)
        for ids, hidden in ((8, 512), (4, 1024), (16, 256))
    ]


TABLE.declare("sparse_logits", _candidates)


def sparse_logits(hidden_NC: Tensor, weight_VC: Tensor, ids_NK: Tensor) -> Tensor:
    """float32 [N, K]; -inf where an id is -1. Other ids must lie within the vocabulary."""
    num_states, num_ids = ids_NK.shape
    out_NK = torch.empty(ids_NK.shape, dtype=torch.float32, device=hidden_NC.device)
    if out_NK.numel() == 0:
        return out_NK
    hidden_NC = hidden_NC if hidden_NC.stride(1) == 1 else hidden_NC.contiguous()
    weight_VC = weight_VC if weight_VC.stride(1) == 1 else weight_VC.contiguous()
    hidden_size = hidden_NC.shape[1]
    key = (hidden_size, str(hidden_NC.dtype).removeprefix("torch."))
    parameters = TABLE.lookup("sparse_logits", capability_of(hidden_NC.device), key)
    sparse_logits_kernel[(num_states, triton.cdiv(num_ids, parameters["IDS_BLOCK"]))](
        hidden_NC,
        weight_VC,
        ids_NK.contiguous(),
        out_NK,
        num_ids,
        hidden_NC.stride(0),
        weight_VC.stride(0),
        HIDDEN_SIZE=hidden_size,
        **parameters.keywords,
    )
    return out_NK


def _compile_case(dtype: str, hidden_size: int) -> CompileCase:
    parameters = _candidates((9, 0), (hidden_size, dtype))[0]
    constants = {"HIDDEN_SIZE": hidden_size, **dict(parameters.constants)}
    types = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "ids_ptr": "*i32", "out_ptr": "*fp32"}
    return CompileCase(
        name=f"sparse_logits {dtype}, hidden size {hidden_size}",
        kernel=sparse_logits_kernel,
        signature=signature_of(sparse_logits_kernel, types, constants),
        constants=constants,
        options=parameters.options,
    )


COMPILE_CASES = (_compile_case("bf16", 4096), _compile_case("fp16", 896), _compile_case("fp32", 2048))
