"""The block types of GGUF files that are kept quantised (layouts: ggml's ggml-common.h).

Legend: O rows, B blocks of a row, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from toka.errors import ConfigError
from toka.weights.gguf_reader import GgufReader
from toka.weights.integer_codes import CodedRows, IntegerCodes
from toka.weights.weight import CheckpointReader, check_shape


@dataclass(frozen=True, slots=True)
class GgufCodes(IntegerCodes):
    """Codes of a GGUF block type, as they are in the file. type_name: ggml's ("Q4_1")."""

    type_name: str

    def check_source(self, reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> None:
        entry = reader.tensors[name]
        if not isinstance(reader, GgufReader) or entry.encoding != self.type_name:
            raise ConfigError(
                f"Tensor {name!r} in {entry.file} is stored as {entry.encoding}, not as {self.type_name}."
            )
        check_shape(entry, name, shape)

    def read_rows(
        self, reader: CheckpointReader, name: str, shape: tuple[int, ...], start: int, stop: int
    ) -> CodedRows:
        assert isinstance(reader, GgufReader)
        return _DECODERS[self.type_name](reader.read_blocks(name, start, stop))


def gguf_codes(type_name: str, int8_activations: bool) -> GgufCodes | None:
    """The format that keeps a GGUF block type; None if there is none, and the tensor is inflated to floats."""
    kept = _KEPT.get(type_name)
    if kept is None:
        return None
    bits, group_size, has_minimums = kept
    return GgufCodes(f"gguf_{type_name.lower()}", bits, group_size, has_minimums, int8_activations, type_name)


# type → bits of our codes, group size, whether there are minimums. The 6-bit codes of Q6_K are kept in 8.
_KEPT: Mapping[str, tuple[int, int, bool]] = MappingProxyType(
    {
        "Q4_0": (4, 32, False),
        "Q4_1": (4, 32, True),
        "Q8_0": (8, 32, False),
        "Q4_K": (4, 32, True),
        "Q6_K": (8, 16, False),
    }
)


def _halves(blocks_OBb: Tensor, start: int, count: int = 1) -> Tensor:
    """`count` float16 numbers of each block as float32 [O, B, count]."""
    return blocks_OBb[..., start : start + 2 * count].contiguous().view(torch.float16).float()


def _low_then_high(bytes_OBb: Tensor) -> Tensor:
    """The codes in the low halves of a block's bytes, then those in the high halves."""
    return torch.cat((bytes_OBb & 15, bytes_OBb >> 4), -1)


def _q4_0(raw: Tensor) -> CodedRows:
    """float16 scale, 16 bytes of codes; value = scale * (code - 8)."""
    blocks = raw.view(raw.shape[0], -1, 18)
    return CodedRows(_low_then_high(blocks[..., 2:]).flatten(1), _halves(blocks, 0).flatten(1))


def _q4_1(raw: Tensor) -> CodedRows:
    """float16 scale, float16 minimum, 16 bytes of codes."""
    blocks = raw.view(raw.shape[0], -1, 20)
    codes = _low_then_high(blocks[..., 4:]).flatten(1)
    return CodedRows(codes, _halves(blocks, 0).flatten(1), _halves(blocks, 2).flatten(1))


def _q8_0(raw: Tensor) -> CodedRows:
    """float16 scale, 32 signed codes."""
    blocks = raw.view(raw.shape[0], -1, 34)
    return CodedRows((blocks[..., 2:] ^ 0x80).flatten(1), _halves(blocks, 0).flatten(1))


def _q4_k(raw: Tensor) -> CodedRows:
    """256 values in 8 groups: float16 scale of the scales and scale of the minimums, 8 + 8 of these in 6 bits each, 128 bytes of codes."""
    blocks = raw.view(raw.shape[0], -1, 144)
    low, middle, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales_OB8 = torch.cat((low & 63, (high & 15) | (low >> 6 << 4)), -1)
    minimums_OB8 = torch.cat((middle & 63, (high >> 4) | (middle >> 6 << 4)), -1)
    codes = _low_then_high(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(1)
    return CodedRows(
        codes, (_halves(blocks, 0) * scales_OB8).flatten(1), (-_halves(blocks, 2) * minimums_OB8).flatten(1)
    )


def _q6_k(raw: Tensor) -> CodedRows:
    """256 values in 16 groups: 128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales, their float16 scale; code - 32."""
    blocks = raw.view(raw.shape[0], -1, 210)
    low = blocks[..., :128].unflatten(-1, (2, 64))
    low_OB2q32 = torch.cat((low & 15, low >> 4), -1).unflatten(-1, (4, 32))
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    codes = low_OB2q32 | (high >> shifts & 3) << 4
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _halves(blocks, 208)
    return CodedRows((codes + (128 - 32)).flatten(1), scales.flatten(1))


_DECODERS: Mapping[str, Callable[[Tensor], CodedRows]] = MappingProxyType(
    {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}
)
