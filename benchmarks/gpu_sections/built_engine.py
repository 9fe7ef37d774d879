"""The engine as `toka` builds it, on random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import toka.engine.build
from gpu_sections.random_weights import RandomReader
from gpu_sections.shapes import Shape
from toka.engine.core import EngineCore
from toka.messages import Ready
from toka.warmup.setup import EngineSetup, settle

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class BuiltEngine:
    """A warm engine and what its steps cost at least.

    weight_bytes: what one step must read of the weights. weight_products: multiplications of weights per token, the head's left out.
    """

    core: EngineCore
    ready: Ready
    setup: EngineSetup
    weight_bytes: int
    weight_products: int

    @property
    def device(self) -> torch.device:
        return self.setup.device

    @property
    def kv_bytes_per_token(self) -> int:
        spec = self.setup.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.setup.dtype.itemsize


def build(shape: Shape, device: str, cache: Path, *, compiled: bool, log_progress: bool) -> BuiltEngine:
    """Compile and warm the engine; the checkpoint is drawn at random when it is asked for."""
    source = shape.write(cache / "configs" / shape.name)
    config = shape.flags(device, compiled=compiled, cache_dir=str(cache))
    setup = settle(config, source)
    reader = RandomReader(setup.spec, setup.dtype, setup.device)
    with mock.patch.object(toka.engine.build, "open_checkpoint", lambda path: reader):
        core, ready = toka.engine.build.build_engine(config, source, quiet=not log_progress)
    sizes = {name: torch.Size(entry.shape).numel() for name, entry in reader.tensors.items()}
    read_once = sum(sizes.values()) - (0 if setup.spec.tied_head else sizes[EMBEDDING])
    products = sum(size for name, size in sizes.items() if name.startswith("model.layers."))
    return BuiltEngine(core, ready, setup, read_once * setup.dtype.itemsize, products)
