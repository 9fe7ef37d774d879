"""Fills a model with a checkpoint's weights: every name used exactly once, none left over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from toka.errors import ConfigError
from toka.gguf_config import ROPE_FACTORS
from toka.weights.gguf_reader import GgufReader
from toka.weights.safetensors_reader import SafetensorsReader
from toka.weights.weight import CheckpointReader, ComputesBuffers, Weight, row_chunks

LoadProgress = Callable[[int, int], None]
"""Called with the bytes that are loaded and the bytes in all, both as the model stores them."""

_NOT_WEIGHTS = (
    "*.rotary_emb.inv_freq",  # older transformers saved these buffers; they follow from the configuration
    ROPE_FACTORS,  # part of the configuration that a GGUF file keeps among its tensors
)
_MAX_NAMES_SHOWN = 3
_MAX_READERS = 4


class LoadableModel(Protocol):
    """What the loader asks of a model; its weights are the `Weight` modules among `modules()`."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def look_at(self, names: Collection[str]) -> None:
        """Told the names of the checkpoint's tensors, before all else."""
        ...

    def checkpoint_name(self, weight: str) -> str:
        """The name that a checkpoint gives to the weight of this name."""
        ...

    def ignores(self, name: str) -> bool:
        """Whether the checkpoint may hold this tensor without the model's using it."""
        ...

    def duplicate_of(self, name: str) -> str | None:
        """The checkpoint's name of the tensor that the tensor `name` must repeat (a tied head the embedding), or None."""
        ...


def open_checkpoint(path: Path) -> CheckpointReader:
    """A reader of the GGUF file or of the directory of safetensors files at `path`. Raises ConfigError if it is unusable."""
    return SafetensorsReader(path) if path.is_dir() else GgufReader(path)


def load_weights(
    model: LoadableModel,
    reader: CheckpointReader,
    device: torch.device | str = "cpu",
    on_progress: LoadProgress | None = None,
) -> None:
    """Allocate the model's weights and buffers on the device and fill them from the checkpoint, a few at a time.

    The model is usually built on the meta device; each weight says its own dtype and format. Beyond the model itself some 16 MB are
    needed for each of at most four readers. Raises ConfigError (one line naming tensor, shapes and file) if the checkpoint does not fit.
    """
    device = torch.device(device)
    model.look_at(reader.tensors.keys())
    weights = {
        model.checkpoint_name(name): module for name, module in model.named_modules() if isinstance(module, Weight)
    }
    _check_names(model, reader, weights)
    order = {name: position for position, name in enumerate(reader.tensors)}
    done, total = 0, sum(weight.num_bytes() for weight in weights.values())
    names = sorted(weights, key=lambda name: order[weights[name].format.checkpoint_names(name)[0]])
    # Reading and dequantising let other threads run, and on CUDA the copies overlap with both.
    with ThreadPoolExecutor(min(torch.get_num_threads(), _MAX_READERS), thread_name_prefix="weights") as pool:
        jobs = [(name, pool.submit(weights[name].load, reader, name, device)) for name in names]
        try:
            for name, job in jobs:
                job.result()
                done += weights[name].num_bytes()
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for _, module in model.named_modules():
        if isinstance(module, ComputesBuffers):
            module.compute_buffers(device)


def _check_names(model: LoadableModel, reader: CheckpointReader, weights: dict[str, Weight]) -> None:
    wanted = {source for name, weight in weights.items() for source in weight.format.checkpoint_names(name)}
    where = next((entry.file for entry in reader.tensors.values()), "the checkpoint")
    if missing := sorted(wanted - reader.tensors.keys()):
        raise ConfigError(
            f"{_listed(missing)} missing from the checkpoint at {where}, though its configuration asks for it."
        )
    left_over = [name for name in reader.tensors if name not in wanted and not _is_known(model, reader, name)]
    if left_over:
        file = reader.tensors[left_over[0]].file
        raise ConfigError(f"{_listed(left_over)} in {file} not known to the model that its configuration describes.")


def _is_known(model: LoadableModel, reader: CheckpointReader, name: str) -> bool:
    if model.ignores(name):
        return True
    original = model.duplicate_of(name)
    if original is None:
        return any(fnmatchcase(name, pattern) for pattern in _NOT_WEIGHTS)
    if not _are_equal(reader, name, original):
        raise ConfigError(
            f"Tensor {name!r} in {reader.tensors[name].file} differs from {original!r}, though the configuration ties the two "
            "(tie_word_embeddings); set it to false there if the checkpoint is meant so."
        )
    return True


def _are_equal(reader: CheckpointReader, name: str, other: str) -> bool:
    shape = reader.tensors[name].shape
    if shape != reader.tensors[other].shape:
        return False
    return all(
        torch.equal(reader.read(name, *rows), reader.read(other, *rows))
        for rows in row_chunks(slice(0, shape[0]), shape)
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMES_SHOWN])
    if len(names) == 1:
        return f"Tensor {shown} is"
    more = f" and {len(names) - _MAX_NAMES_SHOWN} more" if len(names) > _MAX_NAMES_SHOWN else ""
    return f"Tensors {shown}{more} are"
