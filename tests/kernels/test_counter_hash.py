"""The counter-based random numbers against plain integer arithmetic and published values."""

from __future__ import annotations

import torch

from toka.kernels.reference.counter_hash import uniform

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mixer_is_splitmix64() -> None:
    """SplitMix64's first output from state 0 is 0xE220A8397B1DCDAF (the value that its users publish)."""
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert float(uniform(torch.tensor(0), torch.tensor(0))) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53  # mix(0) is 0


def test_same_as_integer_arithmetic() -> None:
    seeds, positions = [0, 1, -1, 2**63 - 1, -(2**63), 12345], [0, 1, 7, 2**31 - 1, 500, 3]
    expected = [
        (mix((mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert uniform(torch.tensor(seeds), torch.tensor(positions, dtype=torch.int32)).tolist() == expected


def test_uniform_over_positions_and_neighbouring_seeds() -> None:
    along_positions = uniform(torch.full((20_000,), 7), torch.arange(20_000))
    along_seeds = uniform(torch.arange(20_000), torch.full((20_000,), 7))
    for numbers in (along_positions, along_seeds):
        counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi-squared, 19 degrees of freedom, 0.1 %
    assert abs(float(torch.corrcoef(torch.stack([along_positions[1:], along_positions[:-1]]))[0, 1])) < 0.03
