"""Integer codes of quantised safetensors checkpoints: GPTQ, AWQ, and compressed-tensors' integer formats.

Legend: O out features, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toka.errors import ConfigError
from toka.weights.integer_codes import CodedRows, IntegerCodes
from toka.weights.packed_words import unpack_awq_words, unpack_words
from toka.weights.weight import CheckpointReader, Piece

_ORDER = "order"


@dataclass(frozen=True, slots=True)
class CheckpointCodes(IntegerCodes):
    """What the three kinds have in common: several tensors beside each other, `prefix.qweight` and the like, in place of `prefix.weight`.

    stored_bits: of a code in the checkpoint; codes of 2 and 3 bits are kept in 4. is_ordered: groups are of in features in an order of
    their own ("act-order"), which the checkpoint tells; then x is brought into it before it is multiplied.
    """

    stored_bits: int
    is_ordered: bool

    def tensor_names(self, prefix: str) -> dict[str, str]:
        """The checkpoint's tensors of a weight, by their role."""
        raise NotImplementedError

    def read_all(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CodedRows:
        """All rows, from the tensors by their role; in features in the checkpoint's order."""
        raise NotImplementedError

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        return tuple(self.tensor_names(name.removesuffix(".weight")).values())

    def part_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        parts = IntegerCodes.part_shapes(self, shape, dtype)
        return {**parts, _ORDER: ((shape[1],), torch.int32)} if self.is_ordered else parts

    def load(
        self,
        reader: CheckpointReader,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Tensor],
        piece: Piece | None,
    ) -> None:
        """Codes are packed along the out features or by columns, so a weight is read whole."""
        names = self.tensor_names(name.removesuffix(".weight"))
        tensors = {role: _whole(reader, full_name) for role, full_name in names.items()}
        try:
            coded = self.read_all(tensors, shape)
            self._check_shapes(coded, shape)
        except (RuntimeError, IndexError) as error:
            file = reader.tensors[next(iter(names.values()))].file
            raise ConfigError(
                f"The tensors of {name!r} in {file} don't fit the configuration, which expects a weight of shape {list(shape)} in "
                f"{self.name}: {str(error).splitlines()[0]}"
            ) from None
        if self.is_ordered:
            if piece is not None and piece.dim == 1:
                raise ConfigError(f"{name}: {self.name} with act-order cannot be cut along the in features")
            order = torch.argsort(tensors["g_idx"], stable=True)
            coded = CodedRows(coded.codes[:, order], coded.scales, coded.minimums)
            parts[_ORDER].copy_(order)
        self.fill(coded, shape, parts, piece)

    def with_zeros(self, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor) -> CodedRows:
        """Rows whose values are scale * (code - zero), as this format keeps them."""
        if self.has_minimums:
            return CodedRows(codes_OI, scales_OG, -zeros_OG * scales_OG)
        half = 2 ** (self.stored_bits - 1)
        if not bool((zeros_OG == half).all()):
            raise RuntimeError(
                "zero points differ from the middle, though the configuration says that codes are symmetric"
            )
        return CodedRows(codes_OI + (2 ** (self.bits - 1) - half), scales_OG)

    def _check_shapes(self, coded: CodedRows, shape: tuple[int, ...]) -> None:
        scales = (shape[0], self.num_groups(shape[1]))
        for what, tensor, expected in (("codes", coded.codes, shape), ("scales", coded.scales, scales)):
            if tuple(tensor.shape) != tuple(expected):
                raise RuntimeError(f"{what} are of shape {list(tensor.shape)}, expected {list(expected)}")

    def linear(self, x_NI: Tensor, parts: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        ordered_NI = x_NI.index_select(1, parts[_ORDER]) if self.is_ordered else x_NI
        return IntegerCodes.linear(self, ordered_NI, parts, bias_O)

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        weight_OI = IntegerCodes.dequantise(self, parts, dtype)
        return weight_OI[:, torch.argsort(parts[_ORDER])] if self.is_ordered else weight_OI


@dataclass(frozen=True, slots=True)
class GptqCodes(CheckpointCodes):
    """GPTQ (Frantar et al., 2022) as AutoGPTQ and GPTQModel store it, 2, 3, 4 or 8 bits.

    qweight int32 [I * bits / 32, O], qzeros int32 [G, O * bits / 32], scales float16 [G, O], g_idx int32 [I] (the group of each in
    feature). zero_offset: what is missing from the stored zeros: 1 in the first version of the format.
    """

    zero_offset: int

    def tensor_names(self, prefix: str) -> dict[str, str]:
        return {role: f"{prefix}.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")}

    def read_all(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CodedRows:
        codes_OI = unpack_words(tensors["qweight"], self.stored_bits, 0).t()
        zeros_OG = (unpack_words(tensors["qzeros"], self.stored_bits, 1).t().int() + self.zero_offset).float()
        return self.with_zeros(codes_OI, tensors["scales"].t().float(), zeros_OG)


@dataclass(frozen=True, slots=True)
class AwqCodes(CheckpointCodes):
    """AWQ (Lin et al., 2023) as AutoAWQ stores it ("gemm"): qweight int32 [I, O / 8], qzeros int32 [G, O / 8], scales float16 [G, O]."""

    def tensor_names(self, prefix: str) -> dict[str, str]:
        return {role: f"{prefix}.{role}" for role in ("qweight", "qzeros", "scales")}

    def read_all(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CodedRows:
        codes_OI, zeros_OG = unpack_awq_words(tensors["qweight"]).t(), unpack_awq_words(tensors["qzeros"]).t()
        return self.with_zeros(codes_OI, tensors["scales"].t().float(), zeros_OG.float())


@dataclass(frozen=True, slots=True)
class CompressedCodes(CheckpointCodes):
    """compressed-tensors' "pack-quantized" (4 or 8 bits in words) and "int-quantized" (int8).

    weight_packed int32 [O, I * bits / 32] or weight int8 [O, I]; weight_scale [O, G]; if not symmetric weight_zero_point, packed along
    the out features or int8 [O, G]; weight_g_idx int32 [I] with act-order.
    """

    is_packed: bool

    def tensor_names(self, prefix: str) -> dict[str, str]:
        names = {
            "codes": f"{prefix}.{'weight_packed' if self.is_packed else 'weight'}",
            "scales": f"{prefix}.weight_scale",
        }
        if self.is_packed:
            names["shape"] = f"{prefix}.weight_shape"
        if self.has_minimums:
            names["zeros"] = f"{prefix}.weight_zero_point"
        if self.is_ordered:
            names["g_idx"] = f"{prefix}.weight_g_idx"
        return names

    def read_all(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CodedRows:
        half = 2 ** (self.stored_bits - 1)
        codes, zeros = tensors["codes"], tensors.get("zeros")
        if self.is_packed:
            codes_OI = unpack_words(codes, self.stored_bits, 1)[:, : shape[1]]
            if zeros is not None and zeros.dtype == torch.int32:
                zeros = unpack_words(zeros, self.stored_bits, 0)[: shape[0]].float() - half
        else:
            codes_OI = (codes.to(torch.int16) + half).to(torch.uint8)
        scales_OG = tensors["scales"].float()
        scales_OG = scales_OG.expand(shape[0], 1) if scales_OG.numel() == 1 else scales_OG
        zeros_OG = torch.zeros_like(scales_OG) if zeros is None else zeros.float()
        return self.with_zeros(codes_OI, scales_OG, zeros_OG + half)


def _whole(reader: CheckpointReader, name: str) -> Tensor:
    return reader.read(name, 0, reader.tensors[name].shape[0])
