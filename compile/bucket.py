"""Sizes that a step is padded to (floor 4).

A step has any number of tokens, but what is warmed, measured and captured are a few sizes, the *buckets*. The ladder below is
exact up to a multiple of the alignment and then grows in equal steps per doubling, like the mantissa of a floating-point number: with s
steps per doubling no size is padded by more than 1/s of itself, and evenly spread sizes by about 0.7/(2 s) in the mean.
"""

from __future__ import annotations

from bisect import bisect_left

STEPS_PER_DOUBLING = 8  # at most 12.5 % of padding, 4 % to 5 % in the mean


def ladder(limit: int, *, align: int = 1, steps_per_doubling: int = STEPS_PER_DOUBLING) -> tuple[int, ...]:
    """All bucket sizes from `align` to `limit`, ascending; `limit` itself is always one.

    limit: largest size, at least 1. align: every size but the last is a multiple of it.
    """
    if limit < 1 or align < 1 or steps_per_doubling < 1:
        raise ValueError(
            f"ladder(limit={limit}, align={align}, steps_per_doubling={steps_per_doubling}): all must be at least 1"
        )
    sizes = []
    size, step = align, align
    while size < limit:
        sizes.append(size)
        if size >= 2 * steps_per_doubling * step:
            step *= 2
        size += step
    return (*sizes, limit)


def bucket_of(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the ascending `sizes` that holds `size`; ValueError when none does."""
    index = bisect_left(sizes, size)
    if index == len(sizes):
        raise ValueError(f"size {size} is beyond the largest bucket, {sizes[-1]}")
    return sizes[index]


def mean_padding(sizes: tuple[int, ...]) -> float:
    """Share of padding over all sizes from 1 to the largest bucket, each as likely as any other: sum(padded) / sum(asked) - 1."""
    asked = range(1, sizes[-1] + 1)
    return sum(bucket_of(size, sizes) for size in asked) / sum(asked) - 1
