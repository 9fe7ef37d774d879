"""Arrays that the host writes and the device reads, all of them in one copy a step (floor 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ALIGN = 64  # bytes: every array begins on a cache line


@dataclass(frozen=True)
class ArraySpec:
    """An array [size, *width] of a dtype."""

    dtype: torch.dtype
    size: int
    width: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.size * int(np.prod(self.width, dtype=np.int64)) * self.dtype.itemsize


class Staging:
    """Named arrays that lie one behind the other in a static buffer on the device.

    On CUDA the host writes into pinned buffers, `depth` of them in turn: one is written while the device has yet to read another,
    and the copy does not hold up the host. On the CPU host and device are the same memory.
    """

    def __init__(self, arrays: Mapping[str, ArraySpec], device: torch.device, depth: int):
        self._arrays = dict(arrays)
        offsets, total = {}, 0
        for name, spec in arrays.items():
            offsets[name] = total
            total += -(-spec.num_bytes // _ALIGN) * _ALIGN
        on_cuda = device.type == "cuda"
        self._host = [torch.zeros(total, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(depth if on_cuda else 1)]
        self._device = self._host[0] if device.type == "cpu" else torch.zeros(total, dtype=torch.uint8, device=device)
        self._host_arrays = [self._views(buffer, offsets) for buffer in self._host]
        self._device_arrays = self._views(self._device, offsets)
        self._read = [torch.cuda.Event() for _ in self._host] if on_cuda else []
        self._numpy: list[dict[str, np.ndarray[Any, Any]]] = [
            {name: tensor.numpy() for name, tensor in each.items()} for each in self._host_arrays
        ]
        self._current = 0

    @property
    def num_bytes(self) -> int:
        """Size on the device."""
        return self._device.nbytes

    def begin(self) -> None:
        """Turn to the next host buffer; waits if the device has not read yet what was written there before."""
        self._current = (self._current + 1) % len(self._host)
        if self._read:
            self._read[self._current].synchronize()

    def write(self, name: str, values: np.ndarray[Any, Any], padded_size: int = 0, padding: int = 0) -> None:
        """The array's first values; up to padded_size, `padding` follows."""
        array = self._numpy[self._current][name]
        array[: len(values)] = values
        if padded_size > len(values):
            array[len(values) : padded_size] = padding

    def send(self) -> None:
        """Let the device read what was written since `begin`, once it has done what it was given before."""
        if self._read:
            self._device.copy_(self._host[self._current], non_blocking=True)
            self._read[self._current].record()

    def on_device(self, name: str, size: int) -> torch.Tensor:
        """The array's first `size` rows as the device sees them; always at the same place."""
        return self._device_arrays[name][:size]

    def _views(self, buffer: torch.Tensor, offsets: Mapping[str, int]) -> dict[str, torch.Tensor]:
        return {
            name: buffer[offsets[name] : offsets[name] + spec.num_bytes].view(spec.dtype).view(spec.size, *spec.width)
            for name, spec in self._arrays.items()
        }
