"""`toka_triton::adjust_logits`, in three launches over a workspace of counts.

1. count_kernel: the tokens of each row, in parts, are counted: 2 for each time that a token was generated, plus 1 if the prompt has it.
2. penalise_kernel: copies the logits in chunks, and penalises those of tokens with a count.
3. forbid_kernel: one program a row adds its biases and forbids the ends of bad words.

Counts are integers, so that their order does not matter: a row's result does not depend on its neighbours, nor on how it is cut.

Legend: S places, V vocabulary, N ids or positions looked at together, W tokens of a bad word.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toka.kernels.triton.compile_case import CompileCase, signature_of
from toka.kernels.triton.tuning import COMPILE_OPTIONS

_PARTS = 16  # programs that share the tokens of one row
_CONSTANTS = {"POSITIONS": 256, "CHUNK": 2048}
_OPTIONS = {"num_warps": 4, "num_stages": 1, **COMPILE_OPTIONS}


@triton.jit
def token_at(position_N, mask_N, row, token_of_slot_ptr, block_table_ptr, table_stride, block_size):
    """The tokens of a row at these positions; -1 beyond the mask."""
    block_ptr_N = block_table_ptr + row.to(tl.int64) * table_stride + position_N // block_size
    block_N = tl.load(block_ptr_N, mask=mask_N, other=0).to(tl.int64)
    return tl.load(token_of_slot_ptr + block_N * block_size + position_N % block_size, mask=mask_N, other=-1)


@triton.jit
def count_kernel(
    counts_ptr,
    rows_ptr,
    seq_lens_ptr,
    token_of_slot_ptr,
    block_table_ptr,
    num_prompt_tokens_ptr,
    vocab_size,
    table_stride,
    block_size,
    POSITIONS: tl.constexpr,
):
    """One program a part of a row's tokens."""
    place = tl.program_id(0)
    row = tl.load(rows_ptr + place)
    if row >= 0:
        length = tl.load(seq_lens_ptr + place)
        num_prompt_tokens = tl.load(num_prompt_tokens_ptr + row)
        counts_ptr += place.to(tl.int64) * vocab_size
        for first in range(tl.program_id(1) * POSITIONS, length, tl.num_programs(1) * POSITIONS):
            position_N = first + tl.arange(0, POSITIONS)
            mask_N = position_N < length
            token_N = token_at(position_N, mask_N, row, token_of_slot_ptr, block_table_ptr, table_stride, block_size)
            is_generated_N = position_N >= num_prompt_tokens
            tl.atomic_add(counts_ptr + token_N, 2, mask=mask_N & is_generated_N, sem="relaxed")
            tl.atomic_or(counts_ptr + token_N, 1, mask=mask_N & (position_N < num_prompt_tokens), sem="relaxed")


@triton.jit
def penalise_kernel(
    adjusted_ptr, logits_ptr, counts_ptr, rows_ptr, penalties_ptr, vocab_size, logits_stride, CHUNK: tl.constexpr
):
    """One program a chunk of a row's logits."""
    place = tl.program_id(1).to(tl.int64)
    id_N = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask_N = id_N < vocab_size
    logit_N = tl.load(logits_ptr + place * logits_stride + id_N, mask=mask_N).to(tl.float32)
    row = tl.load(rows_ptr + place)
    if row >= 0:
        count_N = tl.load(counts_ptr + place * vocab_size + id_N, mask=mask_N, other=0)
        presence = tl.load(penalties_ptr + row * 3)
        frequency = tl.load(penalties_ptr + row * 3 + 1)
        repetition = tl.load(penalties_ptr + row * 3 + 2)
        repeated_N = tl.where(logit_N > 0, tl.div_rn(logit_N, repetition), logit_N * repetition)
        generated_N = count_N >> 1
        taken_N = frequency * generated_N.to(tl.float32) + tl.where(generated_N > 0, presence, 0.0)
        logit_N = tl.where(count_N > 0, repeated_N - taken_N, logit_N)
    tl.store(adjusted_ptr + place * vocab_size + id_N, logit_N, mask=mask_N)


@triton.jit
def forbid_kernel(
    adjusted_ptr,
    rows_ptr,
    seq_lens_ptr,
    token_of_slot_ptr,
    block_table_ptr,
    bias_ids_ptr,
    biases_ptr,
    bad_words_ptr,
    vocab_size,
    table_stride,
    block_size,
    num_biases,
    num_words,
    WORD_TOKENS: tl.constexpr,
    BIASES_BLOCK: tl.constexpr,
    WORDS_BLOCK: tl.constexpr,
):
    """One program a row."""
    place = tl.program_id(0)
    row = tl.load(rows_ptr + place)
    if row >= 0:
        length = tl.load(seq_lens_ptr + place)
        adjusted_ptr += place.to(tl.int64) * vocab_size
        bias_N = tl.arange(0, BIASES_BLOCK)
        id_N = tl.load(bias_ids_ptr + row * num_biases + bias_N, mask=bias_N < num_biases, other=-1)
        by_N = tl.load(biases_ptr + row * num_biases + bias_N, mask=id_N >= 0, other=0.0)
        biased_N = tl.load(adjusted_ptr + id_N, mask=id_N >= 0, other=0.0) + by_N
        tl.store(adjusted_ptr + id_N, biased_N, mask=id_N >= 0)
        tl.debug_barrier()  # another thread may forbid what this one has biased

        word_N = tl.arange(0, WORDS_BLOCK)
        words_ptr_N = bad_words_ptr + (row * num_words + word_N) * WORD_TOKENS
        is_word_N = word_N < num_words
        last_N = tl.load(words_ptr_N + WORD_TOKENS - 1, mask=is_word_N, other=-1)
        comes_N = last_N >= 0
        for i in tl.static_range(WORD_TOKENS - 1):
            position = length - (WORD_TOKENS - 1) + i
            said = token_at(
                tl.maximum(position, 0),
                position >= 0,
                row,
                token_of_slot_ptr,
                block_table_ptr,
                table_stride,
                block_size,
            )
            token_N = tl.load(words_ptr_N + i, mask=is_word_N, other=-1)
            comes_N = comes_N & ((token_N < 0) | (token_N == said))
        tl.store(adjusted_ptr + last_N, float("-inf"), mask=comes_N)


def adjust_logits(
    logits_SV: Tensor,
    rows_S: Tensor,
    seq_lens_S: Tensor,
    token_of_slot: Tensor,
    block_table: Tensor,
    num_prompt_tokens: Tensor,
    penalties: Tensor,
    bias_ids: Tensor,
    biases: Tensor,
    bad_words: Tensor,
    block_size: int,
) -> Tensor:
    """As op_schema.py says."""
    logits_SV = logits_SV if logits_SV.stride(-1) == 1 else logits_SV.contiguous()
    num_places, vocab_size = logits_SV.shape
    adjusted_SV = torch.empty((num_places, vocab_size), dtype=torch.float32, device=logits_SV.device)
    if num_places == 0:
        return adjusted_SV
    counts_SV = torch.empty((num_places, vocab_size), dtype=torch.int32, device=logits_SV.device).zero_()
    tokens = (token_of_slot, block_table)
    count_kernel[(num_places, _PARTS)](
        counts_SV,
        rows_S,
        seq_lens_S,
        *tokens,
        num_prompt_tokens,
        vocab_size,
        block_table.stride(0),
        block_size,
        POSITIONS=_CONSTANTS["POSITIONS"],
        **_OPTIONS,
    )
    penalise_kernel[(triton.cdiv(vocab_size, _CONSTANTS["CHUNK"]), num_places)](
        adjusted_SV,
        logits_SV,
        counts_SV,
        rows_S,
        penalties,
        vocab_size,
        logits_SV.stride(0),
        CHUNK=_CONSTANTS["CHUNK"],
        **_OPTIONS,
    )
    forbid_kernel[(num_places,)](
        adjusted_SV,
        rows_S,
        seq_lens_S,
        *tokens,
        bias_ids,
        biases,
        bad_words,
        vocab_size,
        block_table.stride(0),
        block_size,
        bias_ids.shape[1],
        bad_words.shape[1],
        **_sizes(bias_ids.shape[1], bad_words.shape[1], bad_words.shape[2]),
        **_OPTIONS,
    )
    return adjusted_SV


def workspace_bytes(num_places: int, vocab_size: int) -> int:
    """What the operator takes beside its result while it runs."""
    return num_places * vocab_size * 4


def _sizes(num_biases: int, num_words: int, word_tokens: int) -> dict[str, int]:
    return {
        "WORD_TOKENS": word_tokens,
        "BIASES_BLOCK": triton.next_power_of_2(num_biases),
        "WORDS_BLOCK": triton.next_power_of_2(num_words),
    }


def _compile_case(kernel: Any, dtype: str) -> CompileCase:
    known = {**_CONSTANTS, **_sizes(300, 64, 8)}
    constants = {name: known[name] for name in kernel.arg_names if name in known}
    floats = ("adjusted_ptr", "penalties_ptr", "biases_ptr")
    types = {
        **{name: "*fp32" if name in floats else "*i32" for name in kernel.arg_names if name.endswith("_ptr")},
        **({"logits_ptr": f"*{dtype}"} if "logits_ptr" in kernel.arg_names else {}),
    }
    return CompileCase(
        name=f"adjust_logits: {kernel.__name__} {dtype}",
        kernel=kernel,
        signature=signature_of(kernel, types, constants),
        constants=constants,
        options=_OPTIONS,
        unaligned=tuple(name for name in ("vocab_size", "table_stride", "num_biases") if name in kernel.arg_names),
    )


COMPILE_CASES = [
    _compile_case(count_kernel, "fp32"),
    *(_compile_case(penalise_kernel, dtype) for dtype in ("bf16", "fp16", "fp32")),
    _compile_case(forbid_kernel, "fp32"),
]
