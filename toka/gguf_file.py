"""Reads the head of a GGUF file: its metadata and its table of tensors (floor 1, no torch).

The `gguf` library's own reader makes several Python objects per array element, which takes seconds for the tokenizer arrays of a
usual vocabulary, and it can loop without end on a damaged length. This one checks every length against the file first and decodes
an array in one go; constants and the dequantisation stay the library's.

The format is described in docs/gguf.md of the ggml repository. Only little-endian files of version 2 and 3 are read.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from toka.errors import ConfigError

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # of a tensor, as ggml has it


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. shape: outermost dim first, as torch has it (the file stores it reversed).

    offset, num_bytes: of its data, from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int

    @property
    def row_num_bytes(self) -> int:
        """Bytes of one row, that is of one index of dim 0."""
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The head of one GGUF file; arrays in the metadata are lists of str or numpy arrays, scalars are plain Python values."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @staticmethod
    def open(path: Path) -> GgufFile:
        """Parse the file's head. Raises ConfigError (one line, naming the file) if it is no GGUF file, damaged or cut short."""
        try:
            size = path.stat().st_size
            if size < 4:
                raise _Damaged("it is too short to be a GGUF file")
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, _Cursor(data))
        except OSError as error:
            raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
        except _Damaged as error:
            raise ConfigError(f"{path} cannot be used: {error}.") from None


class _Damaged(Exception):
    """The file breaks the format; the text says how."""


class _Cursor:
    """Reads values one after the other, never past the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self.data):
            raise _Damaged("the file is truncated or corrupt (its head goes on past its end)")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        return _text(self.take(self.u64()))

    def value(self) -> Any:
        kind = _value_type(self.u32())
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is GGUFValueType.ARRAY:
            return self.array()
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def array(self) -> Any:
        kind, count = _value_type(self.u32()), self.u64()
        if kind is GGUFValueType.STRING:
            return self.strings(count)
        if kind is GGUFValueType.ARRAY:
            raise _Damaged("its metadata holds an array of arrays")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def strings(self, count: int) -> list[str]:
        """The hot loop: a vocabulary and its merges are some hundred thousand strings."""
        data, position, read_length = self.data, self.position, struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(data, position)[0]
                strings.append(data[start:position])
                if position > len(data):
                    raise _Damaged("the file is truncated or corrupt (a string goes on past its end)")
        except struct.error:
            raise _Damaged("the file is truncated or corrupt (an array goes on past its end)") from None
        self.position = position
        return [_text(piece) for piece in strings]


def _text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        raise _Damaged("a string in its metadata is not UTF-8") from None


def _value_type(number: int) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise _Damaged(f"its metadata holds a value of unknown type {number}") from None


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise _Damaged("it is not a GGUF file (it does not begin with 'GGUF')")
    version = cursor.u32()
    if version not in (2, 3):
        raise _Damaged(f"GGUF version {version} is not supported (2 and 3 are)")
    num_tensors, num_values = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise _Damaged(f"its metadata holds {key!r} twice")
        metadata[key] = cursor.value()
    table = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"general.alignment must be a power of two, got {alignment}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in table:
        if name in tensors:
            raise _Damaged(f"it holds the tensor {name!r} twice")
        tensor = GgufTensor(name, shape, kind, data_start + offset, _num_bytes(name, shape, kind))
        if tensor.offset + tensor.num_bytes > len(cursor.data):
            raise _Damaged(f"the file is truncated (tensor {name!r} goes on past its end)")
        tensors[name] = tensor
    return GgufFile(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name, num_dims = cursor.string(), cursor.u32()
    if num_dims > _MAX_DIMS:
        raise _Damaged(f"tensor {name!r} has {num_dims} dims, at most {_MAX_DIMS} are possible")
    dims = [cursor.u64() for _ in range(num_dims)]
    number, offset = cursor.u32(), cursor.u64()
    try:
        return name, tuple(reversed(dims)), GGMLQuantizationType(number), offset
    except ValueError:
        raise _Damaged(f"tensor {name!r} is of unknown type {number}") from None


def _num_bytes(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if not all(shape) or not shape or shape[-1] % block_size or (len(shape) == 1 and block_size > 1):
        raise _Damaged(
            f"tensor {name!r} of shape {list(shape)} does not divide into {kind.name} blocks of {block_size}"
        )
    return math.prod(shape) // block_size * block_bytes
