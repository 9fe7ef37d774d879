"""The sampler's last kernel: one program a row finds what top_k, top_p and min_p keep, and draws (see sample.py).

Legend: R rows, S chunks of a row, N ids looked at together, K cuts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toka.kernels.triton.sample_chunks import NUM_CUTS, list_cut, mass_to_reach, row_max
from toka.kernels.triton.sample_logits import (
    FILTERED,
    GREEDY,
    IDLE,
    LARGEST,
    NO_ID,
    PLAIN,
    draw_below,
    grammar_of,
    inverse_of,
    is_in_mask,
    key_of,
    kind_of,
    load_logits,
    logit_of,
    units_of,
    uses_top_k,
    weight_of,
)


@triton.jit
def load_tile(start, source, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Ids, logits and weights from place `start` of what is looked at, -inf beyond its end.

    source: the row's logits, its list, how many ids that holds (0 = all from first_id on are looked at), first_id, how many ids are
    looked at, the ids held back and their number, what grammar_of gives, the largest logit, 1 / temperature.
    """
    logits_ptr, list_ptr, num_listed, first_id, num_ids, held_ptr, num_held, grammar, largest, inverse = source
    place_N = start + tl.arange(0, TILE)
    mask_N = place_N < num_ids
    id_N = tl.load(list_ptr + place_N, mask=place_N < num_listed, other=NO_ID)
    id_N = tl.where(num_listed > 0, id_N, first_id + place_N)
    logit_N = load_logits(logits_ptr, id_N, mask_N, held_ptr, num_held, grammar, MASKED)
    return id_N, logit_N, weight_of(logit_N, largest, inverse)


@triton.jit
def sum_from(key, key_N, units_N, source, num_ids, OF_UNITS: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Units (or the number) of the tokens with at least this key; key_N, units_N: the first tile, which stays in registers."""
    total = tl.sum(tl.where(key_N >= key, units_N if OF_UNITS else 1, 0).to(tl.int64), axis=0)
    for start in range(TILE, num_ids, TILE):
        _, logit_N, weight_N = load_tile(start, source, MASKED, TILE)
        more_N = units_of(weight_N) if OF_UNITS else 1
        total += tl.sum(tl.where(key_of(logit_N) >= key, more_N, 0).to(tl.int64), axis=0)
    return total


@triton.jit
def last_key_reaching(
    wanted,
    lowest_key,
    largest,
    key_N,
    units_N,
    source,
    num_ids,
    OF_UNITS: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """A key from which on the tokens' units (or number) just reach `wanted`, else lowest_key; and the sum above it.

    Just: without the tokens of that very key they fall short, or there are none and the sum is exact.
    """
    low, high = lowest_key.to(tl.int64), key_of(largest).to(tl.int64) + 1  # from `high` on they fall short
    while high - low > 1:
        middle = (low + high) >> 1
        reached = sum_from(middle.to(tl.int32), key_N, units_N, source, num_ids, OF_UNITS, MASKED, TILE)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached > wanted, high, middle + (reached == wanted).to(tl.int64))
    key = low.to(tl.int32)
    return key, sum_from(key + 1, key_N, units_N, source, num_ids, OF_UNITS, MASKED, TILE)


@triton.jit
def last_kept(
    lowest_key,
    total,
    top_k,
    top_p,
    vocab_size,
    largest,
    inverse,
    source,
    num_ids,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """What top_k and top_p keep: all above last_key, and of those that tie there the first num_ties. total: units of the row."""
    _, logit_N, weight_N = load_tile(0, source, MASKED, TILE)
    key_N, units_N = key_of(logit_N), units_of(weight_N)
    last_key, num_ties = lowest_key, tl.full([], NO_ID, tl.int64)
    if uses_top_k(top_k, vocab_size):
        last_key, num_above = last_key_reaching(
            top_k, last_key, largest, key_N, units_N, source, num_ids, False, MASKED, TILE
        )
        num_from = sum_from(last_key, key_N, units_N, source, num_ids, False, MASKED, TILE)
        num_ties = tl.minimum(top_k, num_from) - num_above
        units_above = sum_from(last_key + 1, key_N, units_N, source, num_ids, True, MASKED, TILE)
        total = units_above + num_ties * units_of(weight_of(logit_of(last_key), largest, inverse))
    if top_p < 1.0:
        wanted = mass_to_reach(top_p, total)
        last_key, units_above = last_key_reaching(
            wanted, last_key, largest, key_N, units_N, source, num_ids, True, MASKED, TILE
        )
        units_of_tie = tl.maximum(units_of(weight_of(logit_of(last_key), largest, inverse)), 1)
        num_ties = (wanted - units_above + units_of_tie - 1) // units_of_tie
    return last_key, num_ties


@triton.jit
def kept_units(logit_N, weight_N, last_key, num_ties, min_p):
    """Units of what the filters keep, 0 for the rest; and how many of these tokens tie at last_key, of which num_ties are kept."""
    key_N = key_of(logit_N)
    ties_N = (key_N == last_key).to(tl.int64)
    is_kept_N = (key_N > last_key) | ((ties_N > 0) & (tl.cumsum(ties_N, axis=0) <= num_ties))
    return tl.where(is_kept_N & (weight_N >= min_p), units_of(weight_N), 0), tl.sum(ties_N, axis=0)


@triton.jit
def sum_kept(last_key, num_ties, min_p, source, num_ids, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Units of all that the filters keep."""
    total = tl.zeros([], tl.int64)
    for start in range(0, num_ids, TILE):
        _, logit_N, weight_N = load_tile(start, source, MASKED, TILE)
        kept_N, more_ties = kept_units(logit_N, weight_N, last_key, num_ties, min_p)
        total += tl.sum(kept_N, axis=0)
        num_ties -= more_ties
    return total


@triton.jit
def first_beyond(target, last_key, num_ties, min_p, source, num_ids, MASKED: tl.constexpr, TILE: tl.constexpr):
    """The first id at which the sum of what is kept exceeds the target; NO_ID if it never does."""
    found, start = tl.full([], NO_ID, tl.int32), tl.zeros([], tl.int32)
    while (found == NO_ID) & (start < num_ids):
        id_N, logit_N, weight_N = load_tile(start, source, MASKED, TILE)
        kept_N, more_ties = kept_units(logit_N, weight_N, last_key, num_ties, min_p)
        found = tl.min(tl.where(tl.cumsum(kept_N, axis=0) > target, id_N, NO_ID), axis=0)
        target -= tl.sum(kept_N, axis=0)
        num_ties -= more_ties
        start += TILE
    return found


@triton.jit
def lowest_allowed(vocab_size, held_ptr, num_held, grammar, MASKED: tl.constexpr, TILE: tl.constexpr):
    """The lowest id that the grammar allows and that is not held back; failing that, that the grammar allows; failing that, 0."""
    free, allowed, start = tl.full([], NO_ID, tl.int32), tl.full([], NO_ID, tl.int32), tl.zeros([], tl.int32)
    while (free == NO_ID) & (start < vocab_size):
        id_N = start + tl.arange(0, TILE)
        allowed_N = tl.where((id_N < vocab_size) & is_in_mask(id_N, grammar, MASKED), id_N, NO_ID)
        allowed = tl.minimum(allowed, tl.min(allowed_N, axis=0))
        for i in range(0, num_held):
            allowed_N = tl.where(id_N == tl.load(held_ptr + i), NO_ID, allowed_N)
        free = tl.min(allowed_N, axis=0)
        start += TILE
    lowest = tl.where(free == NO_ID, allowed, free)
    return tl.where(lowest == NO_ID, 0, lowest)


@triton.jit
def choose_kernel(
    logits_ptr,
    rows_ptr,
    seq_lens_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    held_back_ids_ptr,
    held_back_until_ptr,
    masks_ptr,
    mask_of_ptr,
    max_ptr,
    argmax_ptr,
    cut_ptr,
    mass_ptr,
    count_ptr,
    list_ptr,
    last_token_ptr,
    sampled_ptr,
    vocab_size,
    logits_stride,
    num_words,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    NUM_HELD: tl.constexpr,
    MASKED: tl.constexpr,
    LIST_CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    kind = kind_of(row, vocab_size, temperature_ptr, top_k_ptr, top_p_ptr)
    if kind == IDLE:
        tl.store(sampled_ptr + i, 0)
    else:
        position = tl.load(seq_lens_ptr + i)
        num_held = tl.where(position < tl.load(held_back_until_ptr + row), NUM_HELD, 0)
        held_ptr = held_back_ids_ptr + row * NUM_HELD
        words_ptr, num_words = grammar_of(i, masks_ptr, mask_of_ptr, num_words, MASKED)
        chunk_S = tl.arange(0, CHUNKS_BLOCK)
        max_S = row_max(max_ptr, i, NUM_CHUNKS, CHUNKS_BLOCK)
        argmax_S = tl.load(argmax_ptr + i * NUM_CHUNKS + chunk_S, mask=chunk_S < NUM_CHUNKS, other=NO_ID)
        largest = tl.max(max_S, axis=0)
        token = tl.min(tl.where(max_S == largest, argmax_S, NO_ID), axis=0)
        if largest == float("-inf"):
            token = lowest_allowed(vocab_size, held_ptr, num_held, (words_ptr, num_words), MASKED, TILE)
        elif kind != GREEDY:
            inverse = inverse_of(tl.load(temperature_ptr + row))
            seed, min_p = tl.load(seed_ptr + row), tl.load(min_p_ptr + row)
            top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
            if kind == PLAIN:
                # The chunk into which the draw falls.
                mass_at = mass_ptr + (i * NUM_CUTS + NUM_CUTS - 1) * NUM_CHUNKS + chunk_S
                mass_S = tl.load(mass_at, mask=chunk_S < NUM_CHUNKS, other=0)
                total = tl.sum(mass_S, axis=0)
                target = draw_below(total, seed, position)
                is_passed_S = (tl.cumsum(mass_S, axis=0) <= target) & (chunk_S < NUM_CHUNKS - 1)
                chunk = tl.sum(is_passed_S.to(tl.int32), axis=0)
                target -= tl.sum(tl.where(chunk_S < chunk, mass_S, 0), axis=0)
                num_listed, first_id = tl.zeros([], tl.int32), chunk * CHUNK
                num_ids = tl.minimum(CHUNK, vocab_size - first_id)
                last_key = key_of(tl.full([], -LARGEST, tl.float32))
            else:
                cut, num_listed, total = list_cut(
                    mass_ptr, count_ptr, i, top_k, top_p, vocab_size, NUM_CHUNKS, CHUNKS_BLOCK
                )
                target = tl.zeros([], tl.int64)
                first_id = tl.zeros([], tl.int32)
                num_listed = tl.where(num_listed <= LIST_CAPACITY, num_listed, 0)
                num_ids = tl.where(num_listed > 0, num_listed, vocab_size)
                num_held = tl.where(num_listed > 0, 0, num_held)  # none of them is listed, nor what the grammar forbids
                num_words = tl.where(num_listed > 0, 0, num_words)
                last_key = key_of(tl.load(cut_ptr + i * NUM_CUTS + cut))
            num_ties = tl.full([], NO_ID, tl.int64)
            row_ptr, ids_ptr = logits_ptr + i.to(tl.int64) * logits_stride, list_ptr + i * LIST_CAPACITY
            grammar = (words_ptr, num_words)
            source = (row_ptr, ids_ptr, num_listed, first_id, num_ids, held_ptr, num_held, grammar, largest, inverse)
            if kind == FILTERED:
                last_key, num_ties = last_kept(
                    last_key, total, top_k, top_p, vocab_size, largest, inverse, source, num_ids, MASKED, TILE
                )
                target = draw_below(sum_kept(last_key, num_ties, min_p, source, num_ids, MASKED, TILE), seed, position)
            found = first_beyond(target, last_key, num_ties, min_p, source, num_ids, MASKED, TILE)
            token = tl.where(found == NO_ID, token, found)
        tl.store(sampled_ptr + i, token)
        tl.store(last_token_ptr + row, token)
