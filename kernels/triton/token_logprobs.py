"""`toka_triton::token_logprobs`: logprob and rank of one token a row, and the likeliest tokens, in two launches.

1. chunk_kernel: each row's vocabulary is cut into chunks; of each its largest logit, the sum of its exponentials, how many of its tokens
   are likelier than the one asked for, and its k likeliest.
2. merge_kernel: one program a row joins its chunks.

A token stands for one int64 that orders it: the logit's bits above, the id below, so that of equal logits the lower id comes first and
"the next likeliest" is one maximum. Programs of a row that asks for nothing return at once, and the host reads shapes only, so that a CUDA
graph may hold the launches. The cutting follows from the vocabulary alone: a row's result does not depend on its neighbours.

Legend: S places, V vocabulary, C logits of a chunk, P chunks of a row, N candidates of a row, K likeliest tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.errors import InvariantError
from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.sample_logits import drawable, key_of, logit_of
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters, capability_of

NO_TOKEN = tl.constexpr(-(2**63))  # orders below every token


def _candidates(capability: Capability, key: Key) -> list[LaunchParameters]:
    """key: (vocab_size,). CHUNK: logits of a program. The interpreter pays by the program; there a small vocabulary is cut all the same."""
    if capability == INTERPRETER:
        return [LaunchParameters.of(4, 1, CHUNK=512 if int(key[0]) <= 5000 else 16384)]
    return [LaunchParameters.of(num_warps, 1, CHUNK=chunk) for num_warps, chunk in ((4, 2048), (8, 4096), (4, 1024))]


TABLE.declare("token_logprobs", _candidates)


@triton.jit
def order_of(logit, token):
    """The int64 that stands for a token."""
    return (key_of(logit).to(tl.int64) << 32) | (token ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def token_of(order):
    return (order & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def logit_in(order):
    return logit_of((order >> 32).to(tl.int32))


@triton.jit
def chunk_kernel(
    logits_ptr,
    ids_ptr,
    max_ptr,
    sum_ptr,
    before_ptr,
    candidate_ptr,
    vocab_size,
    logits_stride,
    NUM_CHUNKS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk and row. max_ptr, sum_ptr, before_ptr [S, P]; candidate_ptr [S, P, K] in order, NO_TOKEN where none is left."""
    chunk, i = tl.program_id(0), tl.program_id(1)
    token = tl.load(ids_ptr + i)
    if token >= 0:
        row_ptr = logits_ptr + i.to(tl.int64) * logits_stride
        id_C = chunk * CHUNK + tl.arange(0, CHUNK)
        is_there_C = id_C < vocab_size
        logit_C = drawable(tl.load(row_ptr + id_C, mask=is_there_C, other=float("-inf")))
        largest = tl.max(logit_C, axis=0)
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        order_C = tl.where(is_there_C, order_of(logit_C, id_C), NO_TOKEN)
        wanted = order_of(drawable(tl.load(row_ptr + token)), token)
        place = i * NUM_CHUNKS + chunk
        tl.store(max_ptr + place, largest)
        tl.store(sum_ptr + place, tl.sum(tl.exp(logit_C - reference), axis=0))
        tl.store(before_ptr + place, tl.sum((order_C > wanted).to(tl.int32), axis=0))
        for k in range(K):
            best = tl.max(order_C, axis=0)
            tl.store(candidate_ptr + place.to(tl.int64) * K + k, best)
            order_C = tl.where(order_C == best, NO_TOKEN, order_C)


@triton.jit
def merge_kernel(
    logits_ptr,
    ids_ptr,
    max_ptr,
    sum_ptr,
    before_ptr,
    candidate_ptr,
    logprob_ptr,
    rank_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    logits_stride,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CANDIDATES_BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    """One program a row; see op_schema.py for what it writes."""
    i = tl.program_id(0)
    token = tl.load(ids_ptr + i)
    if token >= 0:
        chunk_P = tl.arange(0, CHUNKS_BLOCK)
        place_P, is_there_P = i * NUM_CHUNKS + chunk_P, chunk_P < NUM_CHUNKS
        largest_P = tl.load(max_ptr + place_P, mask=is_there_P, other=float("-inf"))
        sum_P = tl.load(sum_ptr + place_P, mask=is_there_P, other=0.0)
        num_before = tl.sum(tl.load(before_ptr + place_P, mask=is_there_P, other=0), axis=0)
        largest = tl.max(largest_P, axis=0)
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        # A chunk of nothing but -inf summed up to 0.
        total = tl.sum(sum_P * tl.exp(largest_P - reference), axis=0)
        log_sum = tl.where(total == 0.0, 0.0, tl.log(total))
        logit = drawable(tl.load(logits_ptr + i.to(tl.int64) * logits_stride + token))
        tl.store(logprob_ptr + i, (logit - reference) - log_sum)
        tl.store(rank_ptr + i, num_before + 1)
        candidate_N = tl.arange(0, CANDIDATES_BLOCK)
        first = i.to(tl.int64) * (NUM_CHUNKS * K)
        order_N = tl.load(candidate_ptr + first + candidate_N, mask=candidate_N < NUM_CHUNKS * K, other=NO_TOKEN)
        for k in range(K):
            best = tl.max(order_N, axis=0)
            is_token = best != NO_TOKEN
            tl.store(top_ids_ptr + i * K + k, tl.where(is_token, token_of(best), -1))
            logprob = (logit_in(best) - reference) - log_sum
            tl.store(top_logprobs_ptr + i * K + k, tl.where(is_token, logprob, float("-inf")))
            order_N = tl.where(order_N == best, NO_TOKEN, order_N)
    else:
        tl.store(logprob_ptr + i, float("-inf"))
        tl.store(rank_ptr + i, 0)
        for k in range(K):
            tl.store(top_ids_ptr + i * K + k, -1)
            tl.store(top_logprobs_ptr + i * K + k, float("-inf"))


def token_logprobs(logits_SV: Tensor, ids_S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As op_schema.py says. Raises InvariantError for ids with gaps."""
    num_places, vocab_size = logits_SV.shape

    def empty(dtype: torch.dtype, *sizes: int) -> Tensor:
        return torch.empty(num_places, *sizes, dtype=dtype, device=logits_SV.device)

    outputs = {
        "logprob_ptr": empty(torch.float32),
        "rank_ptr": empty(torch.int32),
        "top_ids_ptr": empty(torch.int32, k),
        "top_logprobs_ptr": empty(torch.float32, k),
    }
    if not ids_S.is_contiguous():
        raise InvariantError(f"token_logprobs: ids must be contiguous, not of strides {ids_S.stride()}")
    if logits_SV.stride(1) != 1:
        logits_SV = logits_SV.contiguous()
    if num_places:
        parameters = TABLE.lookup("token_logprobs", capability_of(logits_SV.device), (vocab_size,))
        constants = _constants(parameters, vocab_size, k)
        arguments = {
            "logits_ptr": logits_SV,
            "ids_ptr": ids_S,
            **_workspace(num_places, constants["NUM_CHUNKS"], k, logits_SV.device),
            **outputs,
            "vocab_size": vocab_size,
            "logits_stride": logits_SV.stride(0),
            **constants,
        }
        for kernel in (chunk_kernel, merge_kernel):
            grid = (constants["NUM_CHUNKS"], num_places) if kernel is chunk_kernel else (num_places,)
            kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **parameters.options)
    return outputs["logprob_ptr"], outputs["rank_ptr"], outputs["top_ids_ptr"], outputs["top_logprobs_ptr"]


def workspace_bytes(num_places: int, vocab_size: int, k: int) -> int:
    """What the operator takes beside its results while it runs, with the shipped launch parameters."""
    constants = _constants(_candidates((9, 0), (vocab_size,))[0], vocab_size, k)
    buffers = _workspace(num_places, constants["NUM_CHUNKS"], k, torch.device("meta"))
    return sum(tensor.nbytes for tensor in buffers.values())


def _constants(parameters: LaunchParameters, vocab_size: int, k: int) -> dict[str, int]:
    num_chunks = triton.cdiv(vocab_size, parameters["CHUNK"])
    return {
        **dict(parameters.constants),
        "NUM_CHUNKS": num_chunks,
        "CHUNKS_BLOCK": triton.next_power_of_2(num_chunks),
        "CANDIDATES_BLOCK": triton.next_power_of_2(max(num_chunks * k, 1)),
        "K": k,
    }


def _workspace(num_places: int, num_chunks: int, k: int, device: torch.device) -> dict[str, Tensor]:
    """What the first kernel leaves for the second."""

    def empty(dtype: torch.dtype, *sizes: int) -> Tensor:
        return torch.empty(num_places, num_chunks, *sizes, dtype=dtype, device=device)

    return {
        "max_ptr": empty(torch.float32),
        "sum_ptr": empty(torch.float32),
        "before_ptr": empty(torch.int32),
        "candidate_ptr": empty(torch.int64, k),
    }


def _compile_cases(dtype: str, vocab_size: int) -> list[CompileCase]:
    """The kernels as the shipped parameters launch them."""
    parameters = _candidates((9, 0), (vocab_size,))[0]
    known = _constants(parameters, vocab_size, k=20)
    floats = ("max_ptr", "sum_ptr", "logprob_ptr", "top_logprobs_ptr")
    cases = []
    for kernel in (chunk_kernel, merge_kernel):
        names: list[str] = kernel.arg_names
        constants: dict[str, Any] = {name: known[name] for name in names if name in known}
        types = {
            **{name: "*i32" for name in names if name.endswith("_ptr")},
            **{name: "*fp32" for name in names if name in floats},
            **{name: "*i64" for name in names if name == "candidate_ptr"},
            "logits_ptr": f"*{dtype}",
        }
        cases.append(
            CompileCase(
                name=f"token_logprobs: {kernel.__name__} {dtype}, {vocab_size} tokens",
                kernel=kernel,
                signature=signature_of(kernel, types, constants),
                constants=constants,
                options=parameters.options,
            )
        )
    return cases


COMPILE_CASES = [*_compile_cases("bf16", 128_256), *_compile_cases("fp32", 262_144)]
