"""Quantised weights turned into floating point as they are loaded, for who wants no codes or has no kernels for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toka.weights.integer_codes import IntegerCodes
from toka.weights.weight import DENSE, CheckpointReader, Piece


@dataclass(frozen=True, slots=True)
class Inflated:
    """One dense tensor, filled from a checkpoint's codes."""

    stored: IntegerCodes

    @property
    def name(self) -> str:
        return f"{self.stored.name}, inflated"

    def part_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return DENSE.part_shapes(shape, dtype)

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        return self.stored.checkpoint_names(name)

    def load(
        self,
        reader: CheckpointReader,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Tensor],
        piece: Piece | None,
    ) -> None:
        dense = parts["dense"]
        layout = self.stored.part_shapes(tuple(dense.shape), dense.dtype)
        codes = {part: torch.empty(size, dtype=dtype) for part, (size, dtype) in layout.items()}
        self.stored.load(reader, name, shape, codes, piece)
        dense.copy_(self.stored.dequantise(codes, dense.dtype))

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return DENSE.dequantise(parts, dtype)

    def linear(self, x_NI: Tensor, parts: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        return DENSE.linear(x_NI, parts, bias_O)

    def embedding(self, ids_N: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return DENSE.embedding(ids_N, parts, dtype)
