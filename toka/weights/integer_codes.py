"""Weights stored as integer codes with a scale, and perhaps a minimum, for each group of neighbouring in features of a row.

Legend: O out features, I in features, G groups of a row, K = I / G features of a group, N rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import toka.kernels.ops  # noqa: F401  (defines torch.ops.toka)
from toka.errors import ConfigError
from toka.kernels.reference import linear_quantised as reference
from toka.weights.weight import CheckpointReader, Piece, row_chunks


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Some rows of a weight: codes uint8 [O, I] (one a byte, whatever their bits), scales and minimums [O, G] in any float type."""

    codes: Tensor
    scales: Tensor
    minimums: Tensor | None = None


@dataclass(frozen=True, slots=True)
class IntegerCodes:
    """weight[o, i] = scale[o, group of i] * code[o, i] + minimum[o, group of i].

    Parts: codes uint8 [O, I * bits / 8] (of 4 bits the even in feature in the low half); scales and minimums float16 [O, G], or float32 if
    the group is the whole row. Without minimums codes are symmetric: minimum = -2^(bits - 1) * scale.

    bits: 4 or 8. group_size: in features; 0 = the whole row. int8_activations: products round activations to int8 first, group by group.
    Where the rows come from is for subclasses to say.
    """

    name: str
    bits: int
    group_size: int
    has_minimums: bool
    int8_activations: bool

    def num_groups(self, in_features: int) -> int:
        """Groups of a row. Raises ConfigError if it does not divide."""
        if not self.group_size:
            return 1
        if in_features % self.group_size:
            raise ConfigError(
                f"{self.name}: a weight (or a rank's piece of one) with {in_features} in features does not divide into groups of "
                f"{self.group_size}; keep it out of the quantisation with quantize_exclude"
            )
        return in_features // self.group_size

    def part_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        out_features, in_features = shape
        scale_dtype = torch.float16 if self.group_size else torch.float32
        scales = ((out_features, self.num_groups(in_features)), scale_dtype)
        codes = ((out_features, in_features * self.bits // 8), torch.uint8)
        return {"codes": codes, "scales": scales, **({"minimums": scales} if self.has_minimums else {})}

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    def check_source(self, reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> None:
        """Raise ConfigError if the checkpoint's tensors of the weight are not what `read_rows` takes."""
        raise NotImplementedError

    def read_rows(
        self, reader: CheckpointReader, name: str, shape: tuple[int, ...], start: int, stop: int
    ) -> CodedRows:
        """Rows start .. stop - 1 of the weight `name`, whole."""
        raise NotImplementedError

    def load(
        self,
        reader: CheckpointReader,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Tensor],
        piece: Piece | None,
    ) -> None:
        self.check_source(reader, name, shape)
        rows, columns = _bounds(shape, piece)
        for start, stop in row_chunks(rows, shape):
            coded = self.read_rows(reader, name, shape, start, stop)
            self._fill_rows(slice(start - rows.start, stop - rows.start), coded, columns, parts)

    def fill(self, coded: CodedRows, shape: tuple[int, ...], parts: Mapping[str, Tensor], piece: Piece | None) -> None:
        """Fill the parts from all rows of the weight at once."""
        rows, columns = _bounds(shape, piece)
        minimums = None if coded.minimums is None else coded.minimums[rows]
        own = CodedRows(coded.codes[rows], coded.scales[rows], minimums)
        self._fill_rows(slice(0, rows.stop - rows.start), own, columns, parts)

    def _fill_rows(self, here: slice, coded: CodedRows, columns: slice, parts: Mapping[str, Tensor]) -> None:
        groups = slice(0, 1)  # a piece of a row that is one group has the whole row's scale
        if self.group_size:
            groups = slice(columns.start // self.group_size, columns.stop // self.group_size)
        parts["codes"][here].copy_(pack_codes(coded.codes[:, columns], self.bits))
        parts["scales"][here].copy_(coded.scales[:, groups])
        if coded.minimums is not None:
            parts["minimums"][here].copy_(coded.minimums[:, groups])

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return reference.dequantise(parts["codes"], parts["scales"], parts.get("minimums"), self.bits).to(dtype)

    def linear(self, x_NI: Tensor, parts: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.toka.linear_quantised(
            x_NI, parts["codes"], parts["scales"], parts.get("minimums"), bias_O, self.bits, self.int8_activations
        )
        return product

    def embedding(self, ids_N: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        rows: Tensor = torch.ops.toka.embedding_quantised(
            ids_N, parts["codes"], parts["scales"], parts.get("minimums"), self.bits, dtype
        )
        return rows


def _bounds(shape: tuple[int, ...], piece: Piece | None) -> tuple[slice, slice]:
    """Rows and columns of a matrix's piece."""
    rows, columns = piece.bounds(shape) if piece is not None else (slice(0, shape[0]), slice(0, shape[1]))
    return rows, columns


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """uint8 [O, I] → uint8 [O, I * bits / 8]; of 4 bits the even in feature goes into the low half."""
    return codes_OI if bits == 8 else codes_OI[:, 0::2] | codes_OI[:, 1::2] << 4
