"""One uniform number from (seed, position), with no state: the same request draws the same numbers whoever runs beside it.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), read at the place
`position` of the stream that starts at the finalised seed: mix(mix(seed) + (position + 1) * GAMMA). Seeds that follow each other
(the samples of one request) therefore start at unrelated places. All arithmetic is modulo 2**64; cpp/sample.cpp does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) with 53 random bits; seed int64 and position int32 or int64 of one shape."""
    bits = _mix(_mix(seed.to(torch.int64)) + (position.to(torch.int64) + 1) * _signed(_GAMMA))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, places: int) -> Tensor:
    """Logical shift; torch's shift of int64 is arithmetic."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
