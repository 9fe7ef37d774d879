"""`quantize=FORMAT`: a checkpoint in floating point, rounded to integer codes as it is loaded.

Legend: O rows, I in features, G groups of a row, K features of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toka.errors import ConfigError
from toka.weights.integer_codes import CodedRows, IntegerCodes
from toka.weights.weight import CheckpointReader, check_shape

# Shares of a group's range that are tried; values outside are clipped. The one with the smallest squared error is taken.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.72)


@dataclass(frozen=True, slots=True)
class RoundToNearest(IntegerCodes):
    """Codes made at load, each group by itself."""

    def check_source(self, reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> None:
        entry = reader.tensors[name]
        check_shape(entry, name, shape)
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise ConfigError(
                f"quantize={self.name}: tensor {name!r} in {entry.file} is stored as {entry.encoding}, which is quantised already; "
                "leave the flag out"
            )

    def read_rows(
        self, reader: CheckpointReader, name: str, shape: tuple[int, ...], start: int, stop: int
    ) -> CodedRows:
        return self.quantise(reader.read(name, start, stop))

    def quantise(self, weight_OI: Tensor) -> CodedRows:
        """Any rows as codes; scales and minimums as they will be stored, so that rounding them is part of the error that is looked at."""
        values_OGK = weight_OI.float().unflatten(1, (self.num_groups(weight_OI.shape[1]), -1))
        best: tuple[Tensor, ...] | None = None
        for clip in _CLIPS:
            scales_OG1, minimums_OG1 = self._range(values_OGK, clip)
            codes_OGK = ((values_OGK - minimums_OG1) / scales_OG1).round_().clamp_(0, 2**self.bits - 1)
            error_OG1 = (codes_OGK * scales_OG1 + minimums_OG1 - values_OGK).square_().sum(-1, keepdim=True)
            found = (error_OG1, codes_OGK, scales_OG1, minimums_OG1)
            if best is None:
                best = found
            else:
                better_OG1 = error_OG1 < best[0]
                best = tuple(torch.where(better_OG1, new, old) for new, old in zip(found, best, strict=True))
        assert best is not None
        _, codes_OGK, scales_OG1, minimums_OG1 = best
        minimums = minimums_OG1.squeeze(-1) if self.has_minimums else None
        return CodedRows(codes_OGK.to(torch.uint8).flatten(1), scales_OG1.squeeze(-1), minimums)

    def _range(self, values_OGK: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group if this share of its range is kept."""
        half = torch.float16 if self.group_size else torch.float32
        num_steps = 2**self.bits - 1
        if self.has_minimums:
            low, high = torch.aminmax(values_OGK, dim=-1, keepdim=True)
            middle, reach = (low + high) / 2, (high - low) / 2 * clip
            return _without_zeros((2 * reach / num_steps).to(half).float()), (middle - reach).to(half).float()
        largest = values_OGK.abs().amax(-1, keepdim=True) * clip
        scales = _without_zeros((largest / (num_steps // 2)).to(half).float())
        return scales, -(2.0 ** (self.bits - 1)) * scales


def _without_zeros(scales: Tensor) -> Tensor:
    """A group of equal values gets the smallest scale there is, for the division's sake."""
    return scales.clamp(min=torch.finfo(torch.float16).tiny)
