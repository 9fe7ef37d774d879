"""A weight and its format. A *format* is a value that knows which tensors store a weight, how they are loaded, sharded and
dequantised, and which op consumes them; a model holds `Weight`s and never learns their format.

Legend: N rows of a batch, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toka.errors import ConfigError

_CHUNK_NUM_ELEMENTS = 1 << 22  # read at once: bounds what loading needs beyond the final storage


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint. encoding: how the file stores it ("BF16", "Q4_1", ...); dtype: what reading it gives."""

    shape: tuple[int, ...]
    encoding: str
    dtype: torch.dtype
    file: Path


class CheckpointReader(Protocol):
    """A checkpoint under the names that Hugging Face gives its tensors; nothing is read before it is asked for."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors, in the order in which they are best read."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 (along dim 0) of a tensor, on the CPU, in `tensors[name].dtype`."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Piece `index` of `count` equal ones along the tensor dim `dim`."""

    dim: int
    index: int
    count: int

    def bounds(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The piece as slices of a tensor of this shape. Raises ConfigError if it cannot be cut so."""
        if shape[self.dim] % self.count:
            raise ConfigError(
                f"dim {self.dim} of a weight of shape {list(shape)} cannot be cut into {self.count} equal pieces"
            )
        size = shape[self.dim] // self.count
        cut = slice(self.index * size, (self.index + 1) * size)
        return tuple(cut if dim == self.dim else slice(0, length) for dim, length in enumerate(shape))


class WeightFormat(Protocol):
    """How a weight of a logical shape and dtype is stored, loaded and used. A value without state.

    `parts` in the methods are the storing tensors by name, as `Weight` holds them (shaped as `part_shapes` says).
    """

    @property
    def name(self) -> str: ...

    def part_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each storing tensor of a weight (or of a piece of one) of this shape."""
        ...

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint's tensors that the weight `name` is made of."""
        ...

    def load(
        self,
        reader: CheckpointReader,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Tensor],
        piece: Piece | None,
    ) -> None:
        """Fill the parts from the checkpoint; shape is the whole weight's. Raises ConfigError if the checkpoint does not fit."""
        ...

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight as one tensor of its logical shape, in its logical dtype."""
        ...

    def linear(self, x_NI: Tensor, parts: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        """x · weightᵀ + bias of a weight [O, I]; returns [N, O]."""
        ...

    def embedding(self, ids_N: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The rows `ids_N` of a weight [O, I] in its logical dtype; returns [N, I]."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """One tensor of the logical shape and dtype, whatever floating-point type the checkpoint stores (quantised GGUF included)."""

    name: str = "dense"

    def part_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"dense": (shape, dtype)}

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    def load(
        self,
        reader: CheckpointReader,
        name: str,
        shape: tuple[int, ...],
        parts: Mapping[str, Tensor],
        piece: Piece | None,
    ) -> None:
        entry = reader.tensors[name]
        check_shape(entry, name, shape)
        if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
            raise ConfigError(
                f"Tensor {name!r} in {entry.file} is stored as {entry.encoding}, which is not a plain floating-point type "
                "(expected F32, F16 or BF16)."
            )
        bounds = piece.bounds(shape) if piece is not None else tuple(slice(0, length) for length in shape)
        rows, columns = bounds[0], bounds[1:]
        for start, stop in row_chunks(rows, shape):
            chunk = reader.read(name, start, stop)
            parts["dense"][start - rows.start : stop - rows.start].copy_(chunk[(slice(None), *columns)])

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return parts["dense"]

    def linear(self, x_NI: Tensor, parts: Mapping[str, Tensor], bias_O: Tensor | None) -> Tensor:
        return F.linear(x_NI, parts["dense"], bias_O)

    def embedding(self, ids_N: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return F.embedding(ids_N, parts["dense"])


DENSE = Dense()


class Weight(nn.Module):
    """A weight of a model: its logical shape and dtype, its format, and (as parameters) the tensors that store it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, format: WeightFormat = DENSE):
        super().__init__()
        self.shape, self.dtype, self.format = shape, dtype, format
        self._declare(shape, None)

    def use_format(self, format: WeightFormat) -> None:
        """Store it so from now on; to be called before anything is loaded. The storage stays on its device, uninitialised."""
        device = next(self.parameters()).device
        self._parameters.clear()
        self.format = format
        self._declare(self.shape, device)

    def _declare(self, shape: tuple[int, ...], device: torch.device | None) -> None:
        for part, (part_shape, part_dtype) in self.format.part_shapes(shape, self.dtype).items():
            storage = torch.empty(part_shape, dtype=part_dtype, device=device)
            self.register_parameter(part, nn.Parameter(storage, requires_grad=False))

    def load(self, reader: CheckpointReader, name: str, device: torch.device, piece: Piece | None = None) -> None:
        """Allocate the storage on the device and fill it with the checkpoint's tensor `name` or a piece of it."""
        bounds = piece.bounds(self.shape) if piece is not None else None
        local = self.shape if bounds is None else tuple(cut.stop - cut.start for cut in bounds)
        self._declare(local, device)
        self.format.load(reader, name, self.shape, self.parts(), piece)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that store the weight, by name."""
        return {part: getattr(self, part) for part in self._parameters}

    def num_bytes(self) -> int:
        """Size of the storage."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def as_tensor(self) -> Tensor:
        """The weight as one tensor of its logical dtype."""
        return self.format.dequantise(self.parts(), self.dtype)

    def linear(self, x_NI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias; [N, I] → [N, O]."""
        return self.format.linear(x_NI, self.parts(), bias_O)

    def embedding(self, ids_N: Tensor) -> Tensor:
        """Rows of the weight; [N] → [N, I]."""
        return self.format.embedding(ids_N, self.parts(), self.dtype)

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.dtype}, {self.format.name}"


@runtime_checkable
class ComputesBuffers(Protocol):
    """A module with buffers that follow from its settings and so are in no checkpoint."""

    def compute_buffers(self, device: torch.device) -> None:
        """Set every buffer to its value, on the device."""
        ...


def check_shape(entry: TensorEntry, name: str, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless the checkpoint's tensor `name` has the shape that the model expects."""
    if entry.shape != shape:
        raise ConfigError(
            f"Tensor {name!r} in {entry.file} has shape {list(entry.shape)}, the model's configuration expects {list(shape)}."
        )


def row_chunks(rows: slice, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut rows of a tensor of this shape into (start, stop) pairs small enough to be read at once."""
    row_num_elements = max(1, torch.Size(shape[1:]).numel())
    step = max(1, _CHUNK_NUM_ELEMENTS // row_num_elements)
    for start in range(rows.start, rows.stop, step):
        yield start, min(start + step, rows.stop)
