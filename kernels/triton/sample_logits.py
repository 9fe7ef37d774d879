"""What the sampler's kernels share (see sample.py): what a row asks for, its logits as they can be drawn, their weights, one random
number. token_logprobs.py reads logits as they do.

Legend: N ids looked at together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)  # its reciprocal is still finite
UNITS = tl.constexpr(2.0**44)
NO_ID = tl.constexpr(2**31 - 1)

# What a row asks for, in ascending order of work.
IDLE = tl.constexpr(0)
GREEDY = tl.constexpr(1)
PLAIN = tl.constexpr(2)  # neither top_k nor top_p
FILTERED = tl.constexpr(3)


@triton.jit
def uses_top_k(top_k, vocab_size):
    return (top_k > 0) & (top_k < vocab_size)


@triton.jit
def kind_of(row, vocab_size, temperature_ptr, top_k_ptr, top_p_ptr):
    """IDLE, GREEDY, PLAIN or FILTERED."""
    known_row = tl.maximum(row, 0)
    top_k, top_p = tl.load(top_k_ptr + known_row), tl.load(top_p_ptr + known_row)
    kind = tl.where(uses_top_k(top_k, vocab_size) | (top_p < 1.0), FILTERED, PLAIN)
    kind = tl.where(tl.load(temperature_ptr + known_row) == 0.0, GREEDY, kind)
    return tl.where(row < 0, IDLE, kind)


@triton.jit
def drawable(logit):
    """A logit as float32: -inf for NaN, no +inf, no -0."""
    logit = logit.to(tl.float32)
    logit = tl.where(logit == logit, tl.minimum(logit, LARGEST), float("-inf"))
    return tl.where(logit == 0.0, 0.0, logit)


@triton.jit
def grammar_of(i, masks_ptr, mask_of_ptr, num_words, MASKED: tl.constexpr):
    """Where the mask of place i begins, and how many words it has: 0 = any token may be drawn."""
    mask = tl.load(mask_of_ptr + i) if MASKED else -1
    return masks_ptr + tl.maximum(mask, 0).to(tl.int64) * num_words, tl.where(mask >= 0, num_words, 0)


@triton.jit
def is_in_mask(id_N, grammar, MASKED: tl.constexpr):
    """Whether the grammar allows each of these ids (none of them negative). grammar: see grammar_of."""
    words_ptr, num_words = grammar
    if MASKED:
        word_N = tl.load(words_ptr + (id_N >> 5), mask=(id_N >> 5) < num_words, other=-1)
        return ((word_N >> (id_N & 31)) & 1) != 0
    else:
        return id_N >= 0


@triton.jit
def load_logits(logits_ptr, id_N, mask_N, held_ptr, num_held, grammar, MASKED: tl.constexpr):
    """Logits of one row as float32: -inf for what can't be drawn (NaN, the held-back ids, what the grammar forbids, beyond mask_N), no
    +inf, no -0."""
    if MASKED:
        mask_N = mask_N & is_in_mask(id_N, grammar, MASKED)
    logit_N = drawable(tl.load(logits_ptr + id_N, mask=mask_N, other=float("-inf")))
    for i in range(0, num_held):
        logit_N = tl.where(id_N == tl.load(held_ptr + i), float("-inf"), logit_N)
    return logit_N


@triton.jit
def inverse_of(temperature):
    return tl.div_rn(1.0, tl.maximum(temperature, SMALLEST))


@triton.jit
def weight_of(logit, largest, inverse_temperature):
    """Probability up to a factor: the likeliest token weighs 1."""
    return tl.exp((logit - largest) * inverse_temperature)


@triton.jit
def units_of(weight):
    return (weight * UNITS).to(tl.int64)


@triton.jit
def key_of(logit):
    """An int32 in the order of the floats, without NaN."""
    bits = logit.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key):
    """The float of a key; the mapping is its own inverse."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def draw_below(total, seed, position):
    """floor(u * total) for the u in [0, 1) of reference/counter_hash.py, exactly; total int64."""
    step = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    bits = mix(mix(seed.to(tl.uint64, bitcast=True)) + step)
    return tl.umulhi((bits >> 11) << 11, total.to(tl.uint64)).to(tl.int64)
