"""`toka_triton::sample`: the sampler of reference/sample.py, without sorting and without softmax for greedy rows.

Each row's vocabulary is cut into chunks, so that a single row keeps many multiprocessors busy. Four launches:
1. chunk_max_kernel: the largest logit of each chunk, and where it stands first. Greedy rows need no more.
2. chunk_mass_kernel: what each chunk weighs, and how many tokens it has, from a few logits (*cuts*) upwards.
3. list_kernel: these sums tell a cut below which top_k and top_p keep nothing; the ids from it upwards are listed, in order.
4. choose_kernel: finds among the listed ids (among all, if LIST_CAPACITY can't hold them) the last logit that the filters keep, by
   bisection over the float's bits, and draws. A row without top_k and top_p looks into one chunk only.

The launches can be captured in a CUDA graph, and one graph serves every mix of settings: the host reads shapes, strides and dtypes,
never a tensor's contents; grids and workspaces follow from shapes; programs that have nothing to do for their row return at once.

A token weighs exp((logit - largest) / temperature), as an integer in units of 2**-44. Integers have one sum whatever the order, so a
result depends neither on the cutting nor on the batch, and all comparisons are exact. The reference adds the same weights, in float32,
up in float64: its ids differ only where a draw, or the edge of top_p, falls between two sums that differ by the rounding of exp
(2**-22 or so of a weight) and of the units (2**-44 a token), and a token 2**-44 times as likely as the best is never drawn.

Legend: R rows, V vocabulary, S chunks of a row, N ids looked at together, K cuts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from toka.errors import ConfigError, InvariantError
from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.sample_choose import choose_kernel
from toka.kernels.triton.sample_chunks import NUM_CUTS, chunk_mass_kernel, chunk_max_kernel, list_kernel
from toka.kernels.triton.tuning import INTERPRETER, TABLE, Capability, Key, LaunchParameters, capability_of

MAX_VOCAB_SIZE = 2**19 - 1  # more could overflow the sum of weights, which must stay below 2**63

# choose_kernel keeps a tile in registers: 8 values of each kind a thread. Left alone, ptxas takes fewer registers and spills.
CHOOSE_WARPS = 8
CHOOSE_MAX_REGISTERS = 128


def _candidates(capability: Capability, key: Key) -> list[LaunchParameters]:
    """key: (vocab_size,). The results are the same with all of them. CHUNK: logits of a program; TILE: ids that choose_kernel keeps in
    registers; LIST_CAPACITY: ids that may be listed. The interpreter pays by the program, so a large vocabulary comes in large pieces; a
    small one is cut as small as to use every loop."""
    if capability == INTERPRETER:
        is_small = int(key[0]) <= 5000
        small = LaunchParameters.of(4, 1, CHUNK=512, TILE=256, LIST_CAPACITY=400)
        return [small if is_small else LaunchParameters.of(4, 1, CHUNK=16384, TILE=8192, LIST_CAPACITY=8192)]
    return [
        LaunchParameters.of(num_warps, 1, CHUNK=chunk, TILE=2048, LIST_CAPACITY=8192)
        for num_warps, chunk in ((8, 4096), (4, 2048), (8, 8192))
    ]


TABLE.declare("sample", _candidates)


def sample(
    logits_RV: Tensor,
    rows_R: Tensor,
    seq_lens_R: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    held_back_ids: Tensor,
    held_back_until: Tensor,
    last_token: Tensor,
    masks_KW: Tensor | None = None,
    mask_of_R: Tensor | None = None,
) -> Tensor:
    """As op_schema.py says. Without masks the kernels are others, which know of none.

    Raises ConfigError for a vocabulary above MAX_VOCAB_SIZE, or an empty one; InvariantError for a table with gaps.
    """
    num_rows, vocab_size = logits_RV.shape
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ConfigError(f"sample: the vocabulary has {vocab_size} tokens; this kernel takes 1 to {MAX_VOCAB_SIZE}.")
    sampled_R = torch.empty(num_rows, dtype=torch.int32, device=logits_RV.device)
    if num_rows == 0:
        return sampled_R
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    tensors = {
        "rows_ptr": rows_R,
        "seq_lens_ptr": seq_lens_R,
        "temperature_ptr": temperature,
        "top_k_ptr": top_k,
        "top_p_ptr": top_p,
        "min_p_ptr": min_p,
        "seed_ptr": seed,
        "held_back_ids_ptr": held_back_ids,
        "held_back_until_ptr": held_back_until,
        "last_token_ptr": last_token,
        "sampled_ptr": sampled_R,
        # Without masks, pointers that are never followed.
        "masks_ptr": rows_R if masks_KW is None else masks_KW,
        "mask_of_ptr": rows_R if mask_of_R is None else mask_of_R,
    }
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise InvariantError(
                f"sample: {name.removesuffix('_ptr')} must be contiguous, not of strides {tensor.stride()}"
            )

    parameters = TABLE.lookup("sample", capability_of(logits_RV.device), (vocab_size,))
    constants = _constants(parameters, vocab_size, held_back_ids.shape[1], masked=masks_KW is not None)
    arguments = {
        "logits_ptr": logits_RV,
        **tensors,
        **_workspace(num_rows, constants["NUM_CHUNKS"], constants["LIST_CAPACITY"], logits_RV.device),
        "vocab_size": vocab_size,
        "logits_stride": logits_RV.stride(0),
        "num_words": triton.cdiv(vocab_size, 32),
        **constants,
    }
    for kernel, options in _launches(parameters):
        grid = (num_rows,) if kernel is choose_kernel else (constants["NUM_CHUNKS"], num_rows)
        kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, **options)
    return sampled_R


def _launches(parameters: LaunchParameters) -> list[tuple[Any, dict[str, int]]]:
    """The kernels in their order, with Triton's options."""
    options = parameters.options
    choose_options = {**options, "num_warps": CHOOSE_WARPS, "maxnreg": CHOOSE_MAX_REGISTERS}
    return [(kernel, options) for kernel in (chunk_max_kernel, chunk_mass_kernel, list_kernel)] + [
        (choose_kernel, choose_options)
    ]


def _constants(parameters: LaunchParameters, vocab_size: int, num_held: int, *, masked: bool) -> dict[str, int]:
    num_chunks = triton.cdiv(vocab_size, parameters["CHUNK"])
    return {
        **dict(parameters.constants),
        "NUM_CHUNKS": num_chunks,
        "CHUNKS_BLOCK": triton.next_power_of_2(num_chunks),
        "NUM_HELD": num_held,
        "MASKED": masked,
    }


def workspace_bytes(num_rows: int, vocab_size: int) -> int:
    """What the operator takes beside its result while it runs, with the shipped launch parameters."""
    constants = _constants(_candidates((9, 0), (vocab_size,))[0], vocab_size, num_held=0, masked=False)
    buffers = _workspace(num_rows, constants["NUM_CHUNKS"], constants["LIST_CAPACITY"], torch.device("meta"))
    return sum(tensor.nbytes for tensor in buffers.values())


def _workspace(num_rows: int, num_chunks: int, list_capacity: int, device: torch.device) -> dict[str, Tensor]:
    """What one kernel leaves for the next."""

    def empty(dtype: torch.dtype, *sizes: int) -> Tensor:
        return torch.empty(num_rows, *sizes, dtype=dtype, device=device)

    return {
        "max_ptr": empty(torch.float32, num_chunks),
        "argmax_ptr": empty(torch.int32, num_chunks),
        "cut_ptr": empty(torch.float32, NUM_CUTS.value),
        "mass_ptr": empty(torch.int64, NUM_CUTS.value, num_chunks),
        "count_ptr": empty(torch.int32, NUM_CUTS.value, num_chunks),
        "list_ptr": empty(torch.int32, list_capacity),
    }


def _compile_cases(dtype: str, vocab_size: int, *, masked: bool = False) -> list[CompileCase]:
    """The kernels as the shipped parameters launch them."""
    parameters = _candidates((9, 0), (vocab_size,))[0]
    known = _constants(parameters, vocab_size, num_held=16, masked=masked)
    floats = ("temperature_ptr", "top_p_ptr", "min_p_ptr", "max_ptr", "cut_ptr")
    cases = []
    for kernel, options in _launches(parameters):
        constants = {name: known[name] for name in kernel.arg_names if name in known}
        types = {
            **{name: "*i32" for name in kernel.arg_names if name.endswith("_ptr")},
            **{name: "*fp32" for name in kernel.arg_names if name in floats},
            **{name: "*i64" for name in kernel.arg_names if name in ("seed_ptr", "mass_ptr")},
            "logits_ptr": f"*{dtype}",
        }
        cases.append(
            CompileCase(
                name=f"sample: {kernel.__name__} {dtype}, {vocab_size} tokens{', masks' if masked else ''}",
                kernel=kernel,
                signature=signature_of(kernel, types, constants),
                constants=constants,
                options=options,
            )
        )
    return cases


COMPILE_CASES = [
    *_compile_cases("bf16", 128_256),
    *_compile_cases("fp32", 262_144),
    *_compile_cases("bf16", 128_256, masked=True),
]
