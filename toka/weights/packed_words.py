"""Small unsigned codes packed into 32-bit words, as GPTQ, AWQ and compressed-tensors checkpoints hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words along `dim` → uint8 codes of 1..8 bits, 32 / bits times as many along it.

    The words are one stream of bits, the lowest first; codes of 3 bits go over from one word to the next.
    """
    words = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    codes: Tensor
    if 32 % bits == 0:
        codes = words[..., None] >> torch.arange(0, 32, bits)
    else:  # `bits` words hold 32 codes
        groups = words.unflatten(-1, (-1, bits))
        starts = torch.arange(0, 32 * bits, bits)
        first, shift = starts // 32, starts % 32
        following = (first + 1).clamp(max=bits - 1)  # of a code that ends in its word: masked away below
        codes = groups[..., first] >> shift | groups[..., following] << (32 - shift)
    unpacked: Tensor = (codes & (2**bits - 1)).to(torch.uint8).flatten(-2).movedim(-1, dim)
    return unpacked


# Where AWQ puts output 8 c + k of a word c: its k-th nibble holds the output with this number.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_awq_words(words: Tensor) -> Tensor:
    """int32 [n, O / 8] → uint8 [n, O]: codes of 4 bits in AWQ's order."""
    codes = unpack_words(words, 4, 1).unflatten(1, (-1, 8))
    ordered = torch.empty_like(codes)
    ordered[..., _AWQ_ORDER] = codes
    return ordered.flatten(1)
