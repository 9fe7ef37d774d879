"""The sampler's kernels that go over a row's whole vocabulary, one program a chunk (see sample.py).

Legend: R rows, C logits of a chunk, S chunks of a row, K cuts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toka.kernels.triton.sample_logits import (
    FILTERED,
    LARGEST,
    NO_ID,
    PLAIN,
    grammar_of,
    inverse_of,
    kind_of,
    load_logits,
    units_of,
    uses_top_k,
    weight_of,
)

# Cuts below the largest logit, and a last one from which everything counts that can be drawn.
NUM_CUTS = tl.constexpr(6)
CUTS_BLOCK = tl.constexpr(8)


@triton.jit
def chunk_max_kernel(
    logits_ptr,
    rows_ptr,
    seq_lens_ptr,
    held_back_ids_ptr,
    held_back_until_ptr,
    masks_ptr,
    mask_of_ptr,
    max_ptr,
    argmax_ptr,
    vocab_size,
    logits_stride,
    num_words,
    NUM_CHUNKS: tl.constexpr,
    NUM_HELD: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk and row: its largest logit and the lowest id that has it."""
    chunk, i = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + i)
    if row >= 0:
        num_held = tl.where(tl.load(seq_lens_ptr + i) < tl.load(held_back_until_ptr + row), NUM_HELD, 0)
        id_C = chunk * CHUNK + tl.arange(0, CHUNK)
        row_ptr = logits_ptr + i.to(tl.int64) * logits_stride
        grammar = grammar_of(i, masks_ptr, mask_of_ptr, num_words, MASKED)
        held_ptr = held_back_ids_ptr + row * NUM_HELD
        logit_C = load_logits(row_ptr, id_C, id_C < vocab_size, held_ptr, num_held, grammar, MASKED)
        largest = tl.max(logit_C, axis=0)
        tl.store(max_ptr + i * NUM_CHUNKS + chunk, largest)
        tl.store(argmax_ptr + i * NUM_CHUNKS + chunk, tl.min(tl.where(logit_C == largest, id_C, NO_ID), axis=0))


@triton.jit
def row_max(max_ptr, i, NUM_CHUNKS: tl.constexpr, CHUNKS_BLOCK: tl.constexpr):
    """Largest logits of the row's chunks."""
    chunk_S = tl.arange(0, CHUNKS_BLOCK)
    return tl.load(max_ptr + i * NUM_CHUNKS + chunk_S, mask=chunk_S < NUM_CHUNKS, other=float("-inf"))


@triton.jit
def chunk_mass_kernel(
    logits_ptr,
    rows_ptr,
    seq_lens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    held_back_ids_ptr,
    held_back_until_ptr,
    masks_ptr,
    mask_of_ptr,
    max_ptr,
    cut_ptr,
    mass_ptr,
    count_ptr,
    vocab_size,
    logits_stride,
    num_words,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    NUM_HELD: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk and row: units and number of its tokens from each cut upwards; of a plain row its units only, after min_p.

    cut_ptr [R, K], mass_ptr and count_ptr [R, K, S].
    """
    chunk, i = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + i)
    kind = kind_of(row, vocab_size, temperature_ptr, top_k_ptr, top_p_ptr)
    if kind >= PLAIN:
        largest = tl.max(row_max(max_ptr, i, NUM_CHUNKS, CHUNKS_BLOCK), axis=0)
        if largest > float("-inf"):
            num_held = tl.where(tl.load(seq_lens_ptr + i) < tl.load(held_back_until_ptr + row), NUM_HELD, 0)
            id_C = chunk * CHUNK + tl.arange(0, CHUNK)
            row_ptr = logits_ptr + i.to(tl.int64) * logits_stride
            grammar = grammar_of(i, masks_ptr, mask_of_ptr, num_words, MASKED)
            held_ptr = held_back_ids_ptr + row * NUM_HELD
            logit_C = load_logits(row_ptr, id_C, id_C < vocab_size, held_ptr, num_held, grammar, MASKED)
            temperature = tl.load(temperature_ptr + row)
            weight_C = weight_of(logit_C, largest, inverse_of(temperature))
            units_C = units_of(weight_C)
            all_cuts = i * NUM_CUTS
            sums = (all_cuts + NUM_CUTS - 1) * NUM_CHUNKS + chunk
            if kind == PLAIN:
                kept_C = tl.where(weight_C < tl.load(min_p_ptr + row), 0, units_C)
                tl.store(mass_ptr + sums, tl.sum(kept_C, axis=0))
            else:
                for k in tl.static_range(NUM_CUTS):
                    # 1.5, 4.5, 9, 15 and 22.5 temperatures below the largest.
                    cut = tl.maximum(largest - (0.75 * (k + 1) * (k + 2)) * temperature, -LARGEST)
                    if k == NUM_CUTS - 1:
                        cut = -LARGEST + 0.0 * cut
                    # The later kernels read the cuts, since they might round them otherwise.
                    tl.store(cut_ptr + all_cuts + k, cut)
                    counts_C = logit_C >= cut
                    place = (all_cuts + k) * NUM_CHUNKS + chunk
                    tl.store(mass_ptr + place, tl.sum(tl.where(counts_C, units_C, 0), axis=0))
                    tl.store(count_ptr + place, tl.sum(counts_C.to(tl.int32), axis=0))


@triton.jit
def mass_to_reach(top_p, total):
    """The least number of units that holds a share top_p of the total; at least 1, so that the likeliest token stays."""
    share = top_p.to(tl.float64) * total.to(tl.float64)
    whole = share.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < share).to(tl.int64), 1)


@triton.jit
def list_cut(mass_ptr, count_ptr, i, top_k, top_p, vocab_size, NUM_CHUNKS: tl.constexpr, CHUNKS_BLOCK: tl.constexpr):
    """The highest cut that loses nothing which the filters keep, how many tokens lie above it, and the row's units."""
    cut_K, chunk_S = tl.arange(0, CUTS_BLOCK), tl.arange(0, CHUNKS_BLOCK)
    place_KS = (i * NUM_CUTS + cut_K[:, None]) * NUM_CHUNKS + chunk_S[None, :]
    known_KS = (cut_K < NUM_CUTS)[:, None] & (chunk_S < NUM_CHUNKS)[None, :]
    mass_K = tl.sum(tl.load(mass_ptr + place_KS, mask=known_KS, other=0), axis=1)
    count_K = tl.sum(tl.load(count_ptr + place_KS, mask=known_KS, other=0), axis=1)
    total = tl.sum(tl.where(cut_K == NUM_CUTS - 1, mass_K, 0), axis=0)
    # top_p counts what top_k left, which is not more; so top_k's tokens are enough for both.
    enough_K = tl.where(uses_top_k(top_k, vocab_size), count_K >= top_k, mass_K >= mass_to_reach(top_p, total))
    cut = tl.min(tl.where(enough_K & (cut_K < NUM_CUTS), cut_K, NUM_CUTS - 1), axis=0)
    return cut, tl.sum(tl.where(cut_K == cut, count_K, 0), axis=0), total


@triton.jit
def list_kernel(
    logits_ptr,
    rows_ptr,
    seq_lens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    held_back_ids_ptr,
    held_back_until_ptr,
    masks_ptr,
    mask_of_ptr,
    max_ptr,
    cut_ptr,
    mass_ptr,
    count_ptr,
    list_ptr,
    vocab_size,
    logits_stride,
    num_words,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    NUM_HELD: tl.constexpr,
    MASKED: tl.constexpr,
    LIST_CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk and row: lists the ids from the row's cut upwards in list_ptr [R, LIST_CAPACITY], if all of them fit."""
    chunk, i = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + i)
    kind = kind_of(row, vocab_size, temperature_ptr, top_k_ptr, top_p_ptr)
    if kind == FILTERED:
        largest = tl.max(row_max(max_ptr, i, NUM_CHUNKS, CHUNKS_BLOCK), axis=0)
        if largest > float("-inf"):
            top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            cut, num_listed, _ = list_cut(mass_ptr, count_ptr, i, top_k, top_p, vocab_size, NUM_CHUNKS, CHUNKS_BLOCK)
            if num_listed <= LIST_CAPACITY:
                chunk_S = tl.arange(0, CHUNKS_BLOCK)
                count_at = count_ptr + (i * NUM_CUTS + cut) * NUM_CHUNKS + chunk_S
                num_before = tl.sum(tl.load(count_at, mask=chunk_S < chunk, other=0), axis=0)
                num_held = tl.where(tl.load(seq_lens_ptr + i) < tl.load(held_back_until_ptr + row), NUM_HELD, 0)
                id_C = chunk * CHUNK + tl.arange(0, CHUNK)
                row_ptr = logits_ptr + i.to(tl.int64) * logits_stride
                grammar = grammar_of(i, masks_ptr, mask_of_ptr, num_words, MASKED)
                held_ptr = held_back_ids_ptr + row * NUM_HELD
                logit_C = load_logits(row_ptr, id_C, id_C < vocab_size, held_ptr, num_held, grammar, MASKED)
                listed_C = logit_C >= tl.load(cut_ptr + i * NUM_CUTS + cut)
                place_C = num_before + tl.cumsum(listed_C.to(tl.int32), axis=0) - 1
                tl.store(list_ptr + i * LIST_CAPACITY + place_C, id_C, mask=listed_C)
