"""A checkpoint that is made up while it is read, on the device: gigabytes of weights in a second, none of them on disk."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from toka.models.registry import build_model
from toka.models.spec import ModelSpec
from toka.weights.weight import TensorEntry, Weight


class RandomReader:
    """A CheckpointReader of a model's own names and shapes. Norms are 1, all else is drawn so that activations keep their size.

    Unlike a file's, its tensors are on `device`, where the loader wants them in the end. What is read twice differs.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device):
        model = build_model(spec, dtype)
        self._device = device
        self._entries = {
            model.checkpoint_name(name): TensorEntry(tuple(weight.shape), "random", dtype, Path("random"))
            for name, weight in model.named_modules()
            if isinstance(weight, Weight)
        }

    @functools.cached_property
    def _random(self) -> torch.Generator:
        # Not before weights are read: as in any start, the device is not in use while code is compiled in forked processes.
        return torch.Generator(self._device).manual_seed(0)

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self._entries

    def read(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._entries[name]
        shape = (stop - start, *entry.shape[1:])
        if len(shape) == 1:
            return torch.ones(shape, dtype=entry.dtype, device=self._device)
        values = torch.randn(shape, dtype=entry.dtype, device=self._device, generator=self._random)
        return values.mul_(entry.shape[-1] ** -0.5)
