"""Rotary position embedding (Su et al., 2021) and its scalings, with the formulas of transformers' modeling_rope_utils.

Legend: T tokens, H heads, D head dim, F = D / 2 frequencies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toka.models.spec import RopeSpec


class Rope(NamedTuple):
    """Cosines and sines of a step's tokens, each [T, F] in the model's dtype."""

    cos_TF: Tensor
    sin_TF: Tensor

    def rotate(self, x_THD: Tensor) -> Tensor:
        """Turn the pair (x[i], x[i + F]) of every head by the i-th angle of its token."""
        cos_T1F, sin_T1F = self.cos_TF.unsqueeze(1), self.sin_TF.unsqueeze(1)
        first_THF, second_THF = x_THD.chunk(2, dim=-1)
        return torch.cat(
            (first_THF * cos_T1F - second_THF * sin_T1F, second_THF * cos_T1F + first_THF * sin_T1F), dim=-1
        )


class RotaryEmbedding(nn.Module):
    """Positions → Rope, in float32 and cast at the end. Its one buffer is computed, so it is in no checkpoint."""

    inverse_frequencies_F: Tensor

    def __init__(self, rope: RopeSpec, head_dim: int, dtype: torch.dtype):
        super().__init__()
        self.rope, self.head_dim, self.dtype = rope, head_dim, dtype
        self.register_buffer("inverse_frequencies_F", torch.empty(head_dim // 2, dtype=torch.float32), persistent=False)

    def compute_buffers(self, device: torch.device) -> None:
        self.inverse_frequencies_F = inverse_frequencies(self.rope, self.head_dim).to(device)

    def forward(self, positions_T: Tensor) -> Rope:
        if self.rope.type == "dynamic":
            angles_TF = self._dynamic_angles(positions_T)
        else:
            angles_TF = positions_T.unsqueeze(-1).to(torch.float32) * self.inverse_frequencies_F
        scale = self.rope.attention_factor
        return Rope((angles_TF.cos() * scale).to(self.dtype), (angles_TF.sin() * scale).to(self.dtype))

    def _dynamic_angles(self, positions_T: Tensor) -> Tensor:
        """The base grows with the position once it passes the trained context (see RopeSpec)."""
        rope, dim = self.rope, self.head_dim
        positions_T1 = positions_T.unsqueeze(-1).to(torch.float32)
        lengths_T1 = (positions_T1 + 1).clamp(min=rope.original_context_tokens)
        growth_T1 = rope.factor * lengths_T1 / rope.original_context_tokens - (rope.factor - 1)
        exponents_F = -torch.arange(0, dim, 2, dtype=torch.float32, device=positions_T.device) / (dim - 2)
        return positions_T1 * self.inverse_frequencies_F * growth_T1**exponents_F


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians a position advances each frequency; float32 [F] on the CPU. Of dynamic rope, those within the trained context."""
    exponents_F = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse_F = 1.0 / (rope.theta**exponents_F)
    match rope.type:
        case "linear":
            return inverse_F / rope.factor
        case "factors":
            return inverse_F / torch.tensor(rope.factors, dtype=torch.float32)
        case "llama3":
            return _llama3(rope, inverse_F)
        case "yarn":
            return _yarn(rope, head_dim, inverse_F)
        case _:
            return inverse_F


def _llama3(rope: RopeSpec, inverse_F: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    wavelength_F = 2 * math.pi / inverse_F
    longest, shortest = (
        rope.original_context_tokens / rope.low_freq_factor,
        rope.original_context_tokens / rope.high_freq_factor,
    )
    blend_F = (rope.original_context_tokens / wavelength_F - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    divided_F = torch.where(wavelength_F > longest, inverse_F / rope.factor, inverse_F)
    blended_F = (1 - blend_F) * divided_F / rope.factor + blend_F * divided_F
    return torch.where((wavelength_F >= shortest) & (wavelength_F <= longest), blended_F, divided_F)


def _yarn(rope: RopeSpec, head_dim: int, inverse_F: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023): frequencies that turn rarely within the trained context are divided, the others kept."""

    def dim_of(num_rotations: float) -> float:
        return (head_dim * math.log(rope.original_context_tokens / (num_rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # the range may be a single dim
    ramp_F = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inverse_F / rope.factor * ramp_F + inverse_F * (1 - ramp_F)
